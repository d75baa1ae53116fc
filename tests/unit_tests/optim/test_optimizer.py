"""The optimizer: implementations agree, groups are complete, state survives from the start on."""

from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from torchtitan.config.schema import Optimizer
from torchtitan.optim.fused_adam import takes
from torchtitan.optim.optimizer import (
    build_optimizer,
    describe_optimizer,
    set_learning_rate,
    state_by_name,
)

IMPLEMENTATIONS = ("for-loop", "foreach", "fused")
CONFIG = Optimizer(lr=1e-2, weight_decay=0.1)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"norm": nn.LayerNorm(4), "wq": nn.Linear(4, 4)})
    return nn.ModuleDict(
        {"emb": nn.Embedding(8, 4), "layers": nn.ModuleList([layer]), "idle": nn.Linear(4, 4)}
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 5) -> None:
    """Steps whose gradient never reaches model.idle."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        tokens = torch.randint(8, (16,), generator=generator)
        hidden = model["layers"][0]["wq"](model["layers"][0]["norm"](model["emb"](tokens)))
        hidden.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_agree_with_torch_with_lazy_state(name, implementation):
    model, reference = make_model(), make_model()
    train(
        model,
        build_optimizer(
            model.named_parameters(), replace(CONFIG, name=name, implementation=implementation)
        ),
    )
    plain = getattr(torch.optim, name)(
        reference.parameters(),
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        foreach=False,
    )
    train(reference, plain)
    for got, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "flags"),
    [("for-loop", (False, False)), ("foreach", (False, True)), ("fused", (True, False))],
)
def test_the_implementation_asked_for_is_the_one_that_runs(implementation, flags):
    config = replace(CONFIG, implementation=implementation)
    (group,) = build_optimizer(make_model().named_parameters(), config).param_groups
    assert (group["fused"], group["foreach"]) == flags


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_made_at_build_is_what_torch_makes_at_the_first_step(implementation):
    model, reference = make_model(), make_model()
    optimizer = build_optimizer(
        model.named_parameters(), replace(CONFIG, implementation=implementation)
    )
    fused, foreach = implementation == "fused", implementation == "foreach"
    lazy = torch.optim.AdamW(reference.named_parameters(), lr=0.0, fused=fused, foreach=foreach)
    for param in reference.parameters():
        param.grad = torch.zeros_like(param)
    lazy.step()
    expected = state_by_name(lazy)
    for name, state in state_by_name(optimizer).items():
        assert {k: (v.dtype, v.device, v.shape, v.stride()) for k, v in state.items()} == {
            k: (v.dtype, v.device, v.shape, v.stride()) for k, v in expected[name].items()
        }
        assert all(not value.any() for value in state.values())


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_building_and_stepping_leave_a_parameter_without_gradients_alone(name, implementation):
    model = make_model()
    before = weights(model)
    optimizer = build_optimizer(
        model.named_parameters(), replace(CONFIG, name=name, implementation=implementation)
    )
    assert all(torch.equal(param, before[key]) for key, param in model.named_parameters())
    train(model, optimizer)
    state = state_by_name(optimizer)
    assert set(state) == set(before)
    assert torch.equal(model["idle"].weight, before["idle.weight"])
    assert all(not value.any() for value in state["idle.weight"].values())
    assert not torch.equal(model["emb"].weight, before["emb.weight"])


def test_groups_of_several_meshes_are_described_as_one():
    optimizer = build_optimizer(make_model().named_parameters(), CONFIG)
    (group,) = optimizer.param_groups
    optimizer.param_groups[:] = [group | {"params": group["params"][:3]}, group | {"params": group["params"][3:]}]
    assert describe_optimizer(optimizer) == "AdamW: 7 tensors (80 parameters) with weight decay 0.1"


def test_no_decay_exempts_what_its_patterns_match():
    model = make_model()
    optimizer = build_optimizer(
        model.named_parameters(),
        replace(CONFIG, no_decay=["*norm*", "*.bias"], lr=0.5, weight_decay=0.25),
    )
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    exempt = {"layers.0.norm.weight", "layers.0.norm.bias", "layers.0.wq.bias", "idle.bias"}
    assert decay == {name: 0.0 if name in exempt else 0.25 for name, _ in model.named_parameters()}
    assert describe_optimizer(optimizer) == (
        "AdamW: 3 tensors (64 parameters) with weight decay 0.25, 4 tensors (16 parameters) with weight decay 0"
    )

    before = weights(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            param, before[name] * (1.0 if name in exempt else 1 - 0.5 * 0.25)
        )


def test_frozen_parameters_stay_out_and_tied_ones_must_come_once():
    model = make_model()
    model["idle"].requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), CONFIG)
    assert "idle.weight" not in state_by_name(optimizer)
    model["layers"][0]["wq"].weight = model["idle"].weight
    model["idle"].requires_grad_(True)
    with pytest.raises(AssertionError, match="7 parameters in groups, 6 trainable ones"):
        build_optimizer(model.named_parameters(remove_duplicate=False), CONFIG)


def test_a_tensor_without_elements_trains_along():
    model = make_model()
    model["empty"] = nn.Linear(0, 3, bias=False)
    optimizer = build_optimizer(model.named_parameters(), CONFIG)
    model["empty"].weight.grad = torch.zeros(3, 0)
    train(model, optimizer)
    assert state_by_name(optimizer)["empty.weight"]["exp_avg"].shape == (3, 0)


def test_set_learning_rate_reaches_every_group():
    optimizer = build_optimizer(
        make_model().named_parameters(), replace(CONFIG, no_decay=["*.bias"])
    )
    set_learning_rate(optimizer, 3e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-5, 3e-5]


def train_all(model, optimizer, num_steps):
    """Steps in which the parameters that have been idle get gradients, too."""
    for _ in range(num_steps):
        model["idle"](model["emb"].weight).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save_by_name(folder, model, optimizer):
    dcp.save({"optimizer": dict(state_by_name(optimizer))}, checkpoint_id=folder)


def load_by_name(folder, model, optimizer):
    dcp.load({"optimizer": dict(state_by_name(optimizer))}, checkpoint_id=folder)


OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def save_by_torch(folder, model, optimizer):
    dcp.save(get_optimizer_state_dict(model, optimizer, options=OPTIONS), checkpoint_id=folder)


def load_by_torch(folder, model, optimizer):
    state = get_optimizer_state_dict(model, optimizer, options=OPTIONS)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state, options=OPTIONS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("save", "load"),
    [(save_by_name, load_by_name), (save_by_torch, load_by_torch)],
    ids=["by_name", "by_torch"],
)
def test_resuming_before_a_parameter_had_a_gradient(tmp_path, implementation, save, load):
    config = replace(CONFIG, implementation=implementation, no_decay=["*.bias"])
    model = make_model()
    optimizer = build_optimizer(model.named_parameters(), config)
    train(model, optimizer)
    save(tmp_path, model, optimizer)
    resumed = make_model()
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = build_optimizer(resumed.named_parameters(), config)
    load(tmp_path, resumed, resumed_optimizer)
    for each in ((model, optimizer), (resumed, resumed_optimizer)):
        train_all(*each, num_steps=3)
    assert all(map(torch.equal, resumed.parameters(), model.parameters()))
    assert state_by_name(resumed_optimizer)["idle.weight"]["step"] == 3


def test_a_resume_may_regroup_and_its_own_config_counts(tmp_path):
    model = make_model()
    optimizer = build_optimizer(model.named_parameters(), CONFIG)
    train(model, optimizer)
    save_by_name(tmp_path, model, optimizer)
    other = build_optimizer(
        model.named_parameters(), replace(CONFIG, no_decay=["*.bias"], weight_decay=0.5, lr=1.0)
    )
    load_by_name(tmp_path, model, other)
    assert [(group["weight_decay"], group["lr"]) for group in other.param_groups] == [
        (0.5, 1.0),
        (0.0, 1.0),
    ]
    for name, state in state_by_name(optimizer).items():
        assert all(
            torch.equal(value, state_by_name(other)[name][key]) for key, value in state.items()
        )


def test_the_kernel_of_adam_takes_plain_memory_alone(monkeypatch):
    """torchao's wrappers of weights say that they are fp32 on a GPU, and have no address."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    weight = nn.Parameter(torch.zeros(4, 4))
    wrapped = type("Wrapped", (torch.Tensor,), {})(torch.zeros(4, 4))
    assert takes([weight])
    assert not takes([weight, wrapped])
    assert not takes([nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))])
    assert not takes([weight.t()[:2]])
