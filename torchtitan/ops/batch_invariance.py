"""Arithmetic in which what a token gets does not depend on what else is in the batch.

Of the operators that models are made of, these are not so by themselves (torch 2.11, 2.13): matrix
products, which libraries compute by shape; and on CPUs some functions of single numbers, which the
ends of a thread's share get from another implementation than the middle. Attention is not here: it is
computed for each document by itself (models/attention_mask.py), experts by the row (ops/experts.py).
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # no public name in 2.11 and 2.13

from torchtitan.ops import wide_linear  # noqa: F401 - registers the operators that are replaced here
from torchtitan.ops.row_products import one_thread, product

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default}
_WIDE = {
    torch.ops.torchtitan.wide_linear.default: lambda x, weight: product(x.float(), weight.t().float()),
    torch.ops.torchtitan.wide_linear_backward.default: lambda grad, x, weight: (
        product(grad, weight.float()).to(x.dtype),
        (grad.t() @ x.float()).to(weight.dtype),
    ),
}
_POINTWISE = {_aten.silu.default, _aten.sigmoid.default, _aten.rsqrt.default}
_VECTORS = 64
"""Numbers that CPUs compute at a time, at most: two AVX-512 vectors of bf16."""


class BatchInvariance(TorchDispatchMode):
    """Within, eager operators compute each row as if it were alone, in backward too.

    Not the gradients of weights, which are sums over all rows. Compiled code does not see it.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            return _add_product(func, *args, **(kwargs or {}))
        if func in _WIDE:
            return _WIDE[func](*args)
        if func in _POINTWISE and args[0].device.type == "cpu":
            return _in_whole_vectors(func, args[0])
        return func(*args, **(kwargs or {}))


def _add_product(func, *args, beta=1, alpha=1) -> torch.Tensor:
    """mm(a, b), or addmm(term, a, b)."""
    *term, a, b = args
    out = product(a, b)
    return beta * term[0] + alpha * out if term else out


def _in_whole_vectors(func, x: torch.Tensor) -> torch.Tensor:
    filled = x.new_zeros(-(-x.numel() // _VECTORS) * _VECTORS)
    filled[: x.numel()] = x.flatten()
    with one_thread():
        return func(filled)[: x.numel()].view_as(x)
