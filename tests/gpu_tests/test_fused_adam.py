"""Adam's kernel beside torch.optim in fp64: its steps, the clipping in it, and where it is used."""

import pytest
import torch
from torch import nn

from torchtitan.config.schema import Optimizer as OptimizerConfig
from torchtitan.distributed.cast_copy import cast_copy
from torchtitan.distributed.parameter_views import use_cast_parameters
from torchtitan.optim.fused_adam import FusedAdam, FusedAdamW
from torchtitan.optim.optimizer import build_optimizer, take_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = [(1,), (1023,), (64, 33), (3, 5, 7), (4096, 512)]


@pytest.mark.parametrize(
    ("ours", "theirs"), [(FusedAdamW, torch.optim.AdamW), (FusedAdam, torch.optim.Adam)]
)
def test_five_steps_are_those_of_torch(ours, theirs):
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(s, device="cuda", generator=generator) for s in SHAPES]
    mine = [nn.Parameter(weight.clone()) for weight in weights]
    exact = [nn.Parameter(weight.double()) for weight in weights]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, reference = ours(mine, **options, fused=True), theirs(exact, **options)
    for param in mine:
        optimizer.state[param] = {
            "step": torch.zeros((), device="cuda"),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
    for factor in (1.0, 0.3, 0.01, 0.5, 1.0):
        for param, wanted in zip(mine, exact, strict=True):
            param.grad = torch.randn(param.shape, device="cuda", generator=generator)
            wanted.grad = factor * param.grad.double()
        before = [param.grad.clone() for param in mine]
        optimizer.gradient_factor = torch.tensor(factor, device="cuda")
        optimizer.step()
        reference.step()
        for param, wanted, grad in zip(mine, exact, before, strict=True):
            assert torch.equal(param.grad, grad)
            torch.testing.assert_close(param.double(), wanted, rtol=1e-5, atol=1e-6)


def test_steps_are_built_with_it_and_clip():
    model = nn.Linear(64, 32, device="cuda")
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(lr=1e-2))
    assert isinstance(optimizer, FusedAdamW)
    model(torch.randn(8, 64, device="cuda")).sum().backward()
    take_step(optimizer, torch.tensor(0.25, device="cuda", dtype=torch.float64))
    for param in model.parameters():
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.1 * 0.25 * param.grad)
        assert optimizer.state[param]["step"] == 1


def test_gradients_of_a_copy_are_taken_and_the_copy_is_written():
    weights = []
    for kept in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 33), nn.Linear(33, 1)).cuda()
        use_cast_parameters(model, model.modules(), torch.bfloat16, kept)
        optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(lr=1e-2))
        assert isinstance(optimizer, FusedAdamW)
        x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            model(x).float().square().sum().backward()
            dtypes = {parameter.grad.dtype for parameter in model.parameters()}
            assert dtypes == {torch.bfloat16 if kept else torch.float32}
            take_step(optimizer, torch.tensor(0.25, device="cuda"))
            optimizer.zero_grad()
            for parameter in model.parameters() if kept else ():
                assert torch.equal(cast_copy(parameter).tensor, parameter.bfloat16())
        weights.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*weights, strict=True):  # compiled as two kernels, they differ in last bits
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_weights_in_bfloat16_go_by_torchs_kernel():
    model = nn.Linear(64, 32, device="cuda", dtype=torch.bfloat16)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig())
    assert type(optimizer) is torch.optim.AdamW
