"""The passes between the experts' products: gradients and rounding, Triton's on GPUs too."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.ops import swiglu as swiglu_module
from torchtitan.ops.swiglu import Gating, swiglu, swiglu_backward

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
GATINGS = {"swiglu": Gating(), "gpt_oss": Gating(1.702, 7.0, 1.0), "tight": Gating(1.0, 0.5, 0.0)}


def inputs(rows=13, width=40, dtype=torch.float64, weighted=True):
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(rows, 2 * width, generator=generator, dtype=torch.float64)
    d_act = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    scores = torch.rand(rows, generator=generator, dtype=torch.float64)
    exact = dtype == torch.float64
    return z.to(dtype), d_act.to(dtype), (scores if exact else scores.float()) if weighted else None


def test_swiglu_is_silu_of_gate_times_up():
    z, _, scores = inputs()
    gate, up = z.chunk(2, dim=1)
    expected = F.silu(gate) * up * scores.unsqueeze(1)
    torch.testing.assert_close(swiglu(z, scores, Gating()), expected)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("gating", GATINGS.values(), ids=GATINGS)
def test_backward_equals_autograd(gating, weighted):
    z, d_act, scores = inputs(weighted=weighted)
    leaves = [z.requires_grad_(), *([scores.requires_grad_()] if weighted else [])]
    expected = swiglu(z, scores, gating)
    gradients = torch.autograd.grad(expected, leaves, d_act)
    act, d_z, d_scores = swiglu_backward(d_act, z, scores, gating)
    torch.testing.assert_close(act, expected)
    torch.testing.assert_close(d_z, gradients[0])
    if weighted:
        torch.testing.assert_close(d_scores, gradients[1])
    else:
        assert d_scores is None


@pytest.mark.parametrize("rows, width", [(13, 40), (1, 8), (70, 768), (3, 1408), (2, 2880)])
@pytest.mark.parametrize("gating", GATINGS.values(), ids=GATINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_results_are_rounded_once(device, dtype, gating, rows, width):
    kernels = swiglu_module
    if device == "cuda":
        from torchtitan.ops import triton_kernels as kernels  # PyTorch for CPUs has no Triton
    z, d_act, scores = inputs(rows, width, dtype)
    wide = d_act.double(), z.double(), scores.double()
    exact_act, exact_d_z, exact_d_scores = swiglu_backward(*wide, gating)
    z, d_act, scores = z.to(device), d_act.to(device), scores.to(device)
    act, d_z, d_scores = (
        tensor.cpu() for tensor in kernels.swiglu_backward(d_act, z, scores, gating)
    )
    half_step = 1.01 * torch.finfo(dtype).eps / 2
    for mine, exact in [
        (kernels.swiglu(z, scores, gating).cpu(), exact_act), (act, exact_act), (d_z, exact_d_z)
    ]:  # fmt: skip
        torch.testing.assert_close(mine.double(), exact, rtol=half_step, atol=1e-6)
    assert d_scores.dtype == torch.float32
    torch.testing.assert_close(d_scores.double(), exact_d_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("used", [0, 5, 13])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_in_use_are_the_same_where_others_are_left_out(device, used):
    kernels = swiglu_module
    if device == "cuda":
        from torchtitan.ops import triton_kernels as kernels  # PyTorch for CPUs has no Triton
    z, d_act, scores = (tensor.to(device) for tensor in inputs(dtype=torch.bfloat16))
    num_rows = torch.tensor(used, device=device)
    whole = kernels.swiglu(z, scores, Gating()), *kernels.swiglu_backward(d_act, z, scores, Gating())
    z[used:], scores[used:] = float("nan"), float("nan")
    found = (
        kernels.swiglu(z, scores, Gating(), num_rows),
        *kernels.swiglu_backward(d_act, z, scores, Gating(), num_rows),
    )
    for ours, expected in zip(found, whole, strict=True):
        assert torch.equal(ours[:used], expected[:used])
