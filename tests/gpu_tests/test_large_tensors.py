"""Kernels reach what lies beyond 2^31 numbers: no offset is of 32 bits. Needs 60 GiB."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.ops import rows, swiglu
from torchtitan.ops.swiglu import Gating

ON_GPU = torch.cuda.is_available()
LARGE = ON_GPU and torch.cuda.get_device_properties(0).total_memory > 60 * 2**30
ON_HOPPER = LARGE and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not LARGE, reason="needs a GPU of 60 GiB")
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

    here = torch.arange(ROWS, dtype=torch.int32, device="cuda")
    found = products.weights(short, here, x, counts)[1]
    assert_close(found, short[-LAST:].double().T @ x[-LAST:].double())


def test_losses_of_many_logits():
    from torchtitan.ops.triton_loss import cross_entropy_, scaled

    logits = torch.randn(2**15 + LAST, 2**16, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(2**16, (len(logits),), device="cuda")
    expected = F.cross_entropy(logits[-LAST:].float(), labels[-LAST:], reduction="none")
    assert_close(cross_entropy_(logits, labels)[-LAST:], expected)
    factor = torch.tensor(0.3, device="cuda")
    assert torch.equal(scaled(logits, factor, torch.bfloat16)[-LAST:], (logits[-LAST:].float() * factor).bfloat16())


def test_logits_are_read_and_gradients_written_as_float8():
    from torchtitan.ops.float8_head import GRADIENT_SCALE
    from torchtitan.ops.triton_loss import scaled_cross_entropy

    logits = torch.randn(2**15 + LAST, 2**16, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(2**16, (len(logits),), device="cuda")
    losses, by_rows, by_columns = scaled_cross_entropy(logits, labels, GRADIENT_SCALE, torch.float8_e5m2)
    expected = F.cross_entropy(logits[-LAST:].float(), labels[-LAST:], reduction="none")
    assert_close(losses[-LAST:], expected)
    last = scaled_cross_entropy(logits[-LAST:].clone(), labels[-LAST:], GRADIENT_SCALE, torch.float8_e5m2)[1]
    assert torch.equal(by_rows[-LAST:].float(), last.float())
    assert torch.equal(by_columns[:, -LAST:].t().float(), last.float())


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_rows_and_columns_are_quantized(x):
    """Columns in groups of rows, of which the last lies where offsets need more than 32 bits."""
    from torchtitan.ops import float8_triton

    rows = x[: ROWS // 16 * 16]
    counts = torch.tensor([len(rows) - 96, 96], device="cuda")
    data, scale = float8_triton.quantize_rows(rows)
    expected = float8_triton.quantize_rows(rows[-96:])
    assert torch.equal(data[-96:].float(), expected.data.float()) and torch.equal(scale[-96:], expected.scale)
    del data
    data, scale = float8_triton.quantize_group_columns(rows, counts)
    expected = float8_triton.quantize_group_columns(rows[-96:], counts[1:])
    assert torch.equal(data[-96:].float(), expected.data.float()) and torch.equal(scale[1:], expected.scale)
    del data
    by_rows = torch.full((len(rows), 1), 16.0, device="cuda")
    by_columns = torch.full((1, WIDTH), 8.0, device="cuda")
    both = float8_triton.quantize_sides(rows, by_rows, by_columns, torch.float8_e4m3fn)
    for side, factor in zip((both[0], both[1].t()), (16.0, 8.0), strict=True):
        assert torch.equal(side[-96:].float(), (rows[-96:].float() * factor).to(torch.float8_e4m3fn).float())


def test_many_weights_are_updated():
    """The last as by themselves."""
    from torchtitan.ops import triton_adam

    size = 2**31 + 4096
    of = triton_adam.Hyperparameters(1e-2, 0.9, 0.95, 1e-8, 0.1, decoupled=True)
    one, moments = torch.ones((), device="cuda"), [torch.zeros(size, device="cuda") for _ in range(2)]
    weight = torch.randn(size, device="cuda")
    grad = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    parts = [tensor[-4096:].clone() for tensor in (weight, grad, *moments)]
    copy = torch.empty(size, device="cuda", dtype=torch.bfloat16)
    triton_adam.update_(weight, grad, *moments, copy, one, one, of)
    triton_adam.update_(*parts, None, one, one, of)
    for whole, part in zip((weight, *moments), (parts[0], *parts[2:]), strict=True):
        assert torch.equal(whole[-4096:], part)
    assert torch.equal(copy[-4096:], parts[0].bfloat16())


def test_rows_travel_between_gpus(x):
    """One GPU that is its own peer: the last tokens, and rows that lie beyond 2^31 numbers."""
    from torchtitan.ops import peer_kernels
    from torchtitan.ops.peer_rows import PeerTensor

    targets = torch.full((1, ROWS, 1), -1, dtype=torch.int32, device="cuda")
    targets[0, -LAST:, 0] = torch.arange(ROWS - LAST, ROWS, device="cuda").flip(0)
    rows, back = torch.zeros_like(x), torch.zeros_like(x)
    there, here = (PeerTensor((t,), torch.tensor([t.data_ptr()], device="cuda")) for t in (x, back))
    peer_kernels.pull(there, None, targets, rows)
    assert torch.equal(rows[-LAST:], x[-LAST:].flip(0)) and not rows[:LAST].any()
    peer_kernels.push(rows, None, targets, here, None)
    assert torch.equal(back[-LAST:], x[-LAST:]) and not back[:LAST].any()
