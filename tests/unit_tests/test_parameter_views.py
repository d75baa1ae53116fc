"""Copies of parameters in the compute dtype: whose gradients, whose names, and when they follow."""

import gc
import weakref

import pytest
import torch
from torch import nn

from torchtitan.config.schema import Optimizer as OptimizerConfig
from torchtitan.distributed.cast_copy import cast_copy
from torchtitan.distributed.parameter_views import use_cast_parameters
from torchtitan.optim.optimizer import build_optimizer, take_step

DTYPE = torch.bfloat16


def model(kept, tied=False):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if tied:
        layers[1].weight = layers[0].weight
    use_cast_parameters(layers, layers.modules(), DTYPE, kept)
    return layers


def backward(layers, seed):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(DTYPE)
    layers(x).float().square().sum().backward()


def gradients(layers):
    return {name: parameter.grad for name, parameter in layers.named_parameters()}


def test_one_backward_leaves_gradients_in_the_compute_dtype():
    kept, cast = model(True), model(False)
    for layers in (kept, cast):
        backward(layers, 0)
    for name, grad in gradients(cast).items():
        ours = gradients(kept)[name]
        assert ours.dtype == DTYPE and grad.dtype == torch.float32
        assert torch.equal(ours.float(), grad)


def test_several_add_up_in_the_parameters_own_dtype():
    kept, cast = model(True), model(False)
    for layers in (kept, cast):
        for seed in range(3):
            backward(layers, seed)
    for name, grad in gradients(cast).items():
        assert torch.equal(gradients(kept)[name], grad)


def test_only_the_parameters_themselves_have_names():
    layers = model(True)
    before = {name: parameter.detach().clone() for name, parameter in layers.named_parameters()}
    backward(layers, 0)
    assert layers[0].weight.dtype == DTYPE
    assert {p.dtype for p in layers.parameters()} == {torch.float32}
    assert layers.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layers.state_dict().items())


def test_a_weight_of_two_modules_is_cast_at_each_use():
    kept, cast = model(True, tied=True), model(False, tied=True)
    for layers in (kept, cast):
        backward(layers, 0)
    assert cast_copy(kept[0].weight) is None and cast_copy(kept[0]._parameters["bias"]) is not None
    for name in ("0.weight", "0.bias"):
        assert torch.equal(gradients(kept)[name].float(), gradients(cast)[name])


@pytest.mark.parametrize(
    "options",
    [{"implementation": kind} for kind in ("fused", "foreach", "for-loop")]
    + [{"name": "AdamW8bit", "implementation": "foreach"}, {"name": "Muon"}],
    ids=lambda options: "-".join(options.values()),
)
def test_copies_follow_every_optimizer(options):
    kept, cast = model(True), model(False)
    for layers in (kept, cast):
        optimizer = build_optimizer(layers.named_parameters(), OptimizerConfig(lr=1e-2, **options))
        for seed in range(3):
            backward(layers, seed)
            take_step(optimizer, torch.tensor(0.5))
            optimizer.zero_grad()
    for ours, theirs in zip(kept.parameters(), cast.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_copies_follow_what_is_loaded():
    layers = model(True)
    backward(layers, 0)
    layers.load_state_dict({name: t + 1 for name, t in layers.state_dict().items()})
    backward(layers, 0)
    for module in layers:
        assert torch.equal(module.weight, module._parameters["weight"].to(DTYPE))


def test_frozen_parameters_have_no_gradients_until_they_are_thawed():
    layers = model(True)
    layers[0]._parameters["weight"].requires_grad_(False)
    backward(layers, 0)
    assert not layers[0].weight.requires_grad and layers[1].weight.requires_grad
    assert gradients(layers)["0.weight"] is None
    layers[0]._parameters["weight"].requires_grad_(True)
    backward(layers, 0)
    assert gradients(layers)["0.weight"] is not None


def test_copies_live_no_longer_than_the_model():
    layers = model(True)
    backward(layers, 0)
    tensors = [weakref.ref(cast_copy(parameter).tensor) for parameter in layers.parameters()]
    del layers
    gc.collect()
    assert [tensor() for tensor in tensors] == [None] * 4
