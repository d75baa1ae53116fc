"""The passes between the experts' products: their gradient and rounding."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.ops.swiglu import Gating, swiglu, swiglu_backward

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype):
    z, d_act, scores = inputs(dtype=dtype)
    wide = z.double(), d_act.double(), scores.double()
    act, d_z, d_scores = swiglu_backward(d_act, z, scores, Gating())
    expected = swiglu_backward(wide[1], wide[0], wide[2], Gating())
    half_step = torch.finfo(dtype).eps / 2
    pairs = zip((swiglu(z, scores, Gating()), act, d_z), (expected[0], *expected[:2]), strict=True)
    for mine, exact in pairs:
        torch.testing.assert_close(mine.double(), exact, rtol=1.01 * half_step, atol=1e-7)
    assert d_scores.dtype == torch.float32
    torch.testing.assert_close(d_scores.double(), expected[2], rtol=1e-4, atol=1e-5)
