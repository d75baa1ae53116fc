"""Optimizers on a GPU: compiled, fused and in bfloat16. `python -m pytest tests/gpu_tests` where there is one."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from torchtitan.config.schema import Optimizer
from torchtitan.optim.muon import orthogonal
from torchtitan.optim.optimizer import build_optimizer, state_by_name
from torchtitan.optim.state import held_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
SHAPES = {"layers.0.wq.weight": (1024, 512), "layers.0.norm.weight": (512,), "layers.0.experts.w2": (4, 512, 256)}


def make(dtype=torch.float32, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: nn.Parameter(draw.to(device, dtype)) for name, draw in draws.items()}


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        optimizer.step()


def run(config, dtype=torch.float32, device="cuda", products=torch.float32, steps=range(4)):
    """(parameters, optimizer) after some steps."""
    params = make(dtype, device)
    optimizer = build_optimizer(params.items(), config, products, seed=1)
    train(params, optimizer, steps)
    return params, optimizer


def assert_close(ours, theirs, tolerance):
    for name, param in theirs.items():
        error = (ours[name].float().cpu() - param.float().cpu()).norm() / param.float().cpu().norm()
        assert error < tolerance, (name, error)


@needs_torchao
def test_compiled_8_bit_updates_are_the_cpus():
    config = Optimizer(name="AdamW8bit", lr=1e-2)
    on_gpu, optimizer = run(config)
    on_cpu, _ = run(Optimizer(name="AdamW8bit", lr=1e-2, implementation="for-loop"), device="cpu")
    assert_close(on_gpu, on_cpu, 1e-3)
    held = sum(tensor.nbytes for tensor in held_tensors(optimizer.state))
    num = sum(param.numel() for param in on_gpu.values())
    assert held < 2.2 * num


@needs_torchao
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_stochastic_rounding_goes_on_with_the_same_bits(name):
    config = Optimizer(name=name, lr=1e-2, bf16_stochastic_round=True)
    torch.cuda.manual_seed(5)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    whole, _ = run(config, torch.bfloat16)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    params, optimizer = run(config, torch.bfloat16, steps=range(2))
    resumed = build_optimizer(params.items(), config, seed=1)
    state_by_name(resumed).update(dict(state_by_name(optimizer)))
    train(params, resumed, range(2, 4))
    for name, param in whole.items():
        assert torch.equal(params[name], param), name


@needs_torchao
def test_rounding_is_right_on_average():
    step = 2.0**-8 / 16
    params = {"w": nn.Parameter(torch.ones(2**20, dtype=torch.bfloat16, device="cuda"))}
    config = Optimizer(lr=step, weight_decay=0.0, beta1=0.0, beta2=0.0, eps=0.0, bf16_stochastic_round=True)
    optimizer = build_optimizer(params.items(), config, seed=3)
    params["w"].grad = torch.ones_like(params["w"])
    optimizer.step()
    assert set(params["w"].unique().tolist()) == {1.0, 1.0 - 2.0**-8}
    assert params["w"].double().mean().item() == pytest.approx(1 - step, abs=5 * 2.0**-8 * 0.25 / 2**10)


def test_muon_is_the_cpus_and_beside_it_adamw_is_fused():
    config = Optimizer(name="Muon", lr=1e-2)
    on_gpu, optimizer = run(config)
    (adamws,) = [group for group in optimizer.param_groups if "fused" in group]
    assert adamws["fused"] and adamws["param_names"] == ["layers.0.norm.weight"]
    on_cpu, _ = run(config, device="cpu")
    assert_close(on_gpu, on_cpu, 1e-5)


def test_muon_in_bfloat16_is_near_fp32_and_waits_for_nothing():
    x = torch.randn(8, 512, 1024, device="cuda")
    exact, rounded = orthogonal(x), orthogonal(x.bfloat16())
    assert (rounded - exact).norm() / exact.norm() < 0.05
    params = make()
    optimizer = build_optimizer(params.items(), Optimizer(name="Muon"), torch.bfloat16)
    train(params, optimizer, range(1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
