"""Kernels reach what lies beyond 2^31 numbers: no offset is of 32 bits. Needs 40 GiB."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.ops import rows, swiglu
from torchtitan.ops.swiglu import Gating

ON_GPU = torch.cuda.is_available()
LARGE = ON_GPU and torch.cuda.get_device_properties(0).total_memory > 40 * 2**30
ON_HOPPER = LARGE and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not LARGE, reason="needs a GPU of 40 GiB")
LAST = 100
ROWS, WIDTH = 2**20 + LAST, 2048
TOLERANCE = 5e-3  # of bf16: half a step is 2e-3


@pytest.fixture(scope="module")
def x():
    """(ROWS, WIDTH), more than 2^31 numbers."""
    return torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)


def assert_close(mine, expected):
    assert (mine.float() - expected.float()).norm() <= TOLERANCE * expected.float().norm()


def test_rows_are_taken_and_summed(x):
    backwards = torch.arange(ROWS - 1, -1, -1, dtype=torch.int32, device="cuda")
    taken = rows.take_rows(x, backwards)
    assert torch.equal(taken[-LAST:], x[:LAST].flip(0)) and torch.equal(taken[:LAST], x[-LAST:].flip(0))
    del taken
    pairs = torch.stack([backwards, backwards.flip(0)], dim=1)
    summed = rows.sum_rows(x, pairs)
    assert_close(summed[-LAST:], x[:LAST].flip(0).float() + x[-LAST:].float())


def test_rows_are_gated(x):
    from torchtitan.ops import triton_kernels

    scores = torch.rand(ROWS, device="cuda")
    act = triton_kernels.swiglu(x, scores, Gating())
    assert_close(act[-LAST:], swiglu.swiglu(x[-LAST:], scores[-LAST:], Gating()))
    mine = triton_kernels.swiglu_backward(act, x, scores, Gating())
    last = act[-LAST:], x[-LAST:], scores[-LAST:]
    for all_rows, expected in zip(mine, swiglu.swiglu_backward(*last, Gating()), strict=True):
        assert_close(all_rows[-LAST:], expected)


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_experts_multiply(x):
    """The last expert's rows are the last ones."""
    from torchtitan.ops import triton_products as products

    dim, counts = 128, torch.tensor([ROWS - LAST, LAST], device="cuda")
    short = x[:, :dim].contiguous()
    w13 = torch.randn(2, 2, WIDTH // 2, dim, device="cuda", dtype=torch.bfloat16) / 16
    z, act = products.up(short, None, w13, counts, None, Gating())
    exact = short[-LAST:].double() @ w13[1].flatten(0, 1).double().T
    assert_close(z[-LAST:], exact)
    assert_close(act[-LAST:], swiglu.swiglu(exact, None, Gating()))

    w2 = torch.randn(2, dim, WIDTH // 2, device="cuda", dtype=torch.bfloat16) / 16
    mine = products.down_backward(short, None, w2, counts, z, None, Gating())
    d_act = short[-LAST:].double() @ w2[1].double()
    expected = swiglu.swiglu_backward(d_act, z[-LAST:].double(), None, Gating())
    for all_rows, last in zip(mine[:2], expected[:2], strict=True):
        assert_close(all_rows[-LAST:], last)

    b = torch.randn(2, WIDTH, 256, device="cuda", dtype=torch.bfloat16) / 64
    assert_close(products.rows(x, b, counts)[-LAST:], x[-LAST:].double() @ b[1].double())

    here = torch.arange(ROWS, device="cuda")
    found = products.weights(short, here, x, counts)[1]
    assert_close(found, short[-LAST:].double().T @ x[-LAST:].double())


def test_losses_of_many_logits():
    from torchtitan.ops.triton_loss import cross_entropy_

    logits = torch.randn(2**15 + LAST, 2**16, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(2**16, (len(logits),), device="cuda")
    expected = F.cross_entropy(logits[-LAST:].float(), labels[-LAST:], reduction="none")
    assert_close(cross_entropy_(logits, labels)[-LAST:], expected)
