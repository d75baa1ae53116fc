"""A bf16 layer whose result is fp32: as exact as fp32, gradients rounded once, rows independent."""

import pytest
import torch

from torchtitan.ops.batch_invariance import BatchInvariance
from torchtitan.ops.wide_linear import wide_linear

ROWS, IN, OUT = 64, 96, 8


def operands(device="cpu", rows=ROWS, width=IN, out=OUT):
    generator = torch.Generator(device).manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, device=device, generator=generator)
        for shape in ((rows, width), (out, width), (rows, out))
    )
    # Of gradients of very different sizes none may get lost.
    grad *= torch.logspace(-6, 3, rows, device=device).unsqueeze(1)
    return x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), grad


def errors(x, weight, grad):
    out = wide_linear(x, weight)
    assert out.dtype == torch.float32
    ours = torch.autograd.grad(out, [x, weight], grad)
    assert [g.dtype for g in ours] == [torch.bfloat16] * 2
    wanted = x.double() @ weight.double().t()
    exact = grad.double() @ weight.double(), grad.double().t() @ x.double()
    by_row = ((ours[0].double() - exact[0]).norm(dim=1) / exact[0].norm(dim=1)).max()
    of_weight = (ours[1].double() - exact[1]).norm() / exact[1].norm()
    return ((out.double() - wanted).norm() / wanted.norm()).item(), by_row.item(), of_weight.item()


def test_the_result_has_fp32s_digits_and_gradients_bf16s():
    of_out, by_row, of_weight = errors(*operands())
    assert of_out < 1e-6 and by_row < 3e-3 and of_weight < 3e-3


def test_a_gradient_is_rounded_once():
    """In one bf16 number instead of two it would be off by as much before the product as after it."""
    x, weight, grad = operands()
    [ours] = torch.autograd.grad(wide_linear(x, weight), [x], grad)
    once = (grad @ weight.float()).bfloat16()
    assert (ours != once).float().mean() < 0.02


def test_compiled_code_is_the_same():
    x, weight, grad = operands()
    compiled = torch.compile(wide_linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), wide_linear(x, weight))
    for one, other in zip(
        torch.autograd.grad(compiled(x, weight), [x, weight], grad),
        torch.autograd.grad(wide_linear(x, weight), [x, weight], grad),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [1, 7])
def test_rows_can_be_made_independent(rows):
    x, weight, grad = operands()
    part = x.detach()[:rows].clone().requires_grad_()
    with BatchInvariance():
        out, out_of_part = wide_linear(x, weight), wide_linear(part, weight)
        [whole] = torch.autograd.grad(out, [x], grad)
        [alone] = torch.autograd.grad(out_of_part, [part], grad[:rows])
    assert torch.equal(out[:rows], out_of_part) and torch.equal(whole[:rows], alone)
