"""A linear layer of bf16 factors whose result keeps fp32, as an operator. T rows, D in, E out."""

import torch
import torch.nn.functional as F


@torch.library.custom_op("torchtitan::wide_linear", mutates_args=())
def wide_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (T, D) and weight (E, D), bf16, to x @ weight.T (T, E) in fp32.

    Products of bf16 numbers are exact in fp32. A GPU's tensor cores add them up in fp32, too, at some
    ten times the speed of a product of fp32 numbers; they cut sums off, which makes 2e-6 (D 2048).
    """
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


@wide_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(x), len(weight), dtype=torch.float32)


@torch.library.custom_op("torchtitan::wide_linear_backward", mutates_args=())
def wide_linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """From grad (T, E) fp32 the gradients of x (T, D) and weight (E, D), rounded once to bf16."""
    # Two bf16 numbers keep 16 of a gradient's 24 bits, twice what the results can.
    high = grad.bfloat16()
    parts = torch.cat([high, (grad - high).bfloat16()], dim=1)
    d_x = parts @ torch.cat([weight, weight])
    if x.is_cuda:
        d_weight = torch.mm(parts.t(), x, out_dtype=torch.float32)
    else:
        d_weight = parts.t().float() @ x.float()
    return d_x, d_weight.unflatten(0, (2, -1)).sum(0).bfloat16()


@wide_linear_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return wide_linear_backward(grad, *ctx.saved_tensors)


wide_linear.register_autograd(_backward, setup_context=_save)
