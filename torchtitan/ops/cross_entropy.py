"""The training loss from hidden states: product with the output weight and cross-entropy.

T tokens, D model, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from torchtitan.ops.wide import wide_dtype, widened

_CHUNK_BYTES = 2**31
"""Of logits at a time: large enough for products at full speed, small beside weights and activations."""

IGNORE_INDEX = -100
"""The label of a token that is not trained on, PyTorch's default: it adds nothing to the loss."""


class Sides(NamedTuple):
    """A matrix (R, C) as products read it, which sum over the last dim of both their factors."""

    rows: Any
    """(R, C): a tensor, or what stands for one"""
    columns: Any
    """(C, R)"""


@dataclass(frozen=True)
class Products:
    """How a head multiplies: `logits` of hidden and weight's rows, `gradients` of the other sides."""

    hidden: Callable[[torch.Tensor, bool], Sides]
    """Given too whether columns are needed"""
    weight: Callable[[torch.Tensor, bool], Sides]
    loss: Callable[[torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, Sides | None]]
    """Of logits and labels: losses (T,) and the gradient's sides, these where they are needed.
    Logits are not read any more"""
    logits: Callable[[Any, Any], torch.Tensor]
    """a (M, K), b (N, K) -> a @ b.T"""
    gradients: Callable[[Any, Any], torch.Tensor]
    multiple: int = 1
    """Of which products need their numbers of tokens."""


def both_sides(x: torch.Tensor, needs_columns: bool) -> Sides:
    """In high precision."""
    return Sides(x, x.t())


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, K), b (N, K) -> a @ b.T"""
    return a @ b.t()


def loss_in_place(
    logits: torch.Tensor, labels: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, Sides]:
    """`cross_entropy_` for `Products.loss`."""
    return cross_entropy_(logits, labels), both_sides(logits, needs_gradient)


EXACT = Products(both_sides, both_sides, loss_in_place, multiply, multiply)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum over the valid labels of the cross-entropy of softmax(hidden @ weight.T), fp32 scalar.

    hidden (..., D) and weight (V, D) in the compute dtype, plain or DTensors; labels (...) int64. No
    valid label at all gives zero. The caller divides by the number of valid labels in the whole global
    batch, which no single call can know. All logits exist at a time, and are kept for backward.
    """
    logits = F.linear(hidden.flatten(0, -2), weight)
    return F.cross_entropy(logits.float(), labels.flatten(), reduction="sum")


def chunked_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, products: Products = EXACT
) -> torch.Tensor:
    """As `linear_cross_entropy`, for plain tensors; logits exist for some tokens at a time.

    Forward computes the gradients, too: a chunk's logits become their own gradient in place. So no
    logits are kept, and none is computed twice.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    few = products.multiple if len(labels) == 0 else 0
    if missing := few or -len(labels) % products.multiple:  # of zeros, without labels: they add nothing
        hidden = F.pad(hidden, (0, 0, 0, missing))
        labels = F.pad(labels, (0, missing), value=IGNORE_INDEX)
    return _ChunkedLinearCrossEntropy.apply(hidden, weight, labels, products, torch.is_grad_enabled())


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, products, differentiates):
        size = _chunk_size(weight, products.multiple)
        parts = list(zip(hidden.split(size), labels.split(size), strict=True))
        wide = wide_dtype(hidden) if len(parts) > 1 else None
        for_hidden, for_weight = (differentiates and needed for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_weight = None
        losses = []
        weights = products.weight(weight, for_hidden)
        for index, (part, of_part) in enumerate(parts):
            states = products.hidden(part, for_weight)
            logits = products.logits(states.rows, weights.rows).to(hidden.dtype)
            of_tokens, gradient = products.loss(logits, of_part, for_hidden or for_weight)
            losses.append(of_tokens)
            del logits  # `gradient` may be these, or float8 in place of them
            if for_hidden:
                d_part = products.gradients(gradient.rows, weights.columns)
                d_hidden[index * size : index * size + len(part)] = d_part
            if for_weight:
                d_weight = _accumulate(d_weight, gradient.columns, states.columns, products, wide)
            gradient = None  # before the next logits
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx, grad):
        scaled = (None if d is None else _scaled(d, grad, ctx.dtype) for d in ctx.saved_tensors)
        return *scaled, None, None, None


def _scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x * factor, a scalar, rounded once to dtype, in one pass."""
    if x.is_cuda and x.dtype != torch.float64:
        from torchtitan.ops import triton_loss  # PyTorch for CPUs comes without Triton

        return triton_loss.scaled(x, factor, dtype)
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def _chunk_size(weight: torch.Tensor, multiple: int) -> int:
    size = _CHUNK_BYTES // (len(weight) * weight.itemsize)
    return max(multiple, size - size % multiple)


def _accumulate(
    total: torch.Tensor | None, a: Any, b: Any, products: Products, wide: torch.dtype | None
) -> torch.Tensor:
    """total + a @ b.T in `wide`, or just the product where that is None."""
    high = wide is not None and isinstance(a, torch.Tensor)
    if high and a.dtype == wide and total is not None:
        return total.addmm_(a, b.t())
    if high and a.dtype != wide and a.is_cuda:
        if total is None:
            return torch.mm(a, b.t(), out_dtype=wide)
        return torch.addmm(total, a, b.t(), out_dtype=wide, out=total)
    product = products.gradients(a, b)
    return product.to(wide or product.dtype) if total is None else total.add_(product)


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each token's cross-entropy (T,), fp32 (fp64 for fp64), 0 where its label is ignored.

    logits (T, V) become their gradient, softmax minus one at the label, in place; labels (T,) int64.
    """
    if logits.is_cuda and logits.dtype != torch.float64:
        from torchtitan.ops import triton_loss  # PyTorch for CPUs comes without Triton

        return triton_loss.cross_entropy_(logits, labels)
    valid = (labels != IGNORE_INDEX).unsqueeze(1)
    index = labels.unsqueeze(1).where(valid, 0)
    log_softmax = torch.log_softmax(widened(logits), 1)
    losses = -log_softmax.gather(1, index).where(valid, 0).squeeze(1)
    gradient = log_softmax.exp_()
    gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
    logits.copy_(gradient.where(valid, 0))
    return losses
