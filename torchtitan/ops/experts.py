"""Many feed-forward layers at once, as one operator: each row goes through its own expert's SwiGLU.

R rows sorted by expert, D model, F expert width, e experts. One operator, because PyTorch's grouped
GEMM has kernels for few dtypes under fake tensors and compile; and so that backward keeps only what
it needs: the rows (or where they were gathered from), the pre-activation z (R, 2F) and scores.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchtitan.ops.expert_kernels import Kernels
from torchtitan.ops.quantized_kernels import choose
from torchtitan.ops.rows import take_rows
from torchtitan.ops.swiglu import Gating


class Weights(NamedTuple):
    """What e experts are made of; biases may be absent."""

    w13: Tensor
    """(e, 2, F, D): gate before up."""
    w2: Tensor
    """(e, D, F)"""
    b13: Tensor | None
    """(e, 2, F)"""
    b2: Tensor | None
    """(e, D)"""


@torch.library.custom_op("torchtitan::grouped_experts", mutates_args=())
def grouped_experts(
    rows: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    counts: Tensor,
    scores: Tensor | None,
    source: Tensor | None,
    tokens: Tensor | None,
    gating: Sequence[float],
    backend: str,
    max_rows: int,
) -> tuple[Tensor, Tensor]:
    """y = scores * (gated(z) w2^T + b2) (R, D), and z = rows w13^T + b13 (R, 2F).

    rows (R, D); weights as in `Weights`; counts (e,) int64, whose sum may be below R: after it, y
    is 0 and z undefined. scores (R,) fp32 or None for 1. rows = source[tokens] where those are
    given, and backward keeps them in place of rows. `gating` has the fields of `Gating`. At most
    max_rows > 0 rows of intermediates exist at a time; z is then empty, computed again in backward.
    """
    weights = Weights(w13, w2, b13, b2)
    kernels = _kernels(backend, w13)
    if not max_rows:
        return _forward(kernels, rows, weights, counts, scores, Gating(*gating))
    y = rows.new_empty(len(rows), w2.shape[1])
    for part, inside in _parts(len(rows), counts, max_rows):
        scores_in = None if scores is None else scores[part]
        y[part], _ = _forward(kernels, rows[part], weights, inside, scores_in, Gating(*gating))
    return y, _no_rows(rows, w13)


@torch.library.custom_op("torchtitan::grouped_experts_backward", mutates_args=())
def grouped_experts_backward(
    d_y: Tensor,
    z: Tensor,
    rows: Tensor,
    tokens: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    counts: Tensor,
    scores: Tensor | None,
    gating: Sequence[float],
    backend: str,
    max_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, w13, w2, b13, b2 and scores; empty where there is no such input.

    With `tokens` given, `rows` is the tensor that they index.
    """
    weights = Weights(w13, w2, b13, b2)
    kernels = _kernels(backend, w13)
    if not max_rows:
        return _backward(kernels, d_y, z, rows, tokens, weights, counts, scores, Gating(*gating))
    d_rows, d_scores = d_y.new_empty(len(d_y), w13.shape[3]), _empty_like(scores, d_y)
    # Many parts may hold rows of one expert: their sum is rounded once.
    sums = [_empty_like(weight, d_y, _wide(d_y)).zero_() for weight in weights]
    for part, inside in _parts(len(d_y), counts, max_rows):
        rows_in = rows[part] if tokens is None else take_rows(rows, tokens[part])
        scores_in = None if scores is None else scores[part]
        z_in = _preactivation(kernels, rows_in, weights, inside)
        of_part = _backward(
            kernels, d_y[part], z_in, rows_in, None, weights, inside, scores_in, Gating(*gating)
        )
        d_rows[part], *of_weights, d_scores[part] = of_part
        for total, term in zip(sums, of_weights, strict=True):
            total += term
    return d_rows, *(total.to(w13.dtype) for total in sums), d_scores


def _forward(
    kernels: Kernels,
    rows: Tensor,
    weights: Weights,
    counts: Tensor,
    scores: Tensor | None,
    gating: Gating,
) -> tuple[Tensor, Tensor]:
    if not len(rows):
        return rows.new_empty(0, weights.w2.shape[1]), _no_rows(rows, weights.w13)
    z = _preactivation(kernels, rows, weights, counts)
    y = kernels.rows(kernels.swiglu(z, scores, gating, counts.sum()), weights.w2.mT, counts)
    if weights.b2 is not None:
        bias = _per_row(weights.b2, counts, len(rows))
        y += bias if scores is None else (bias * scores.unsqueeze(1)).to(bias.dtype)
    return kernels.clear_after(y, counts), z


def _preactivation(kernels: Kernels, rows: Tensor, weights: Weights, counts: Tensor) -> Tensor:
    z = kernels.rows(rows, weights.w13.flatten(1, 2).mT, counts)
    return z if weights.b13 is None else z + _per_row(weights.b13.flatten(1), counts, len(rows))


def _backward(
    kernels: Kernels,
    d_y: Tensor,
    z: Tensor,
    rows: Tensor,
    tokens: Tensor | None,
    weights: Weights,
    counts: Tensor,
    scores: Tensor | None,
    gating: Gating,
) -> tuple[Tensor, ...]:
    """Gradients of rows, w13, w2, b13, b2 and scores. No tensor of R rows lives longer than used."""
    w13, w2, b13, b2 = weights
    if not len(d_y):
        of_weights = (_empty_like(weight, d_y).zero_() for weight in weights)
        return d_y.new_empty(0, w13.shape[3]), *of_weights, _empty_like(scores, d_y)
    act, d_z, d_scores = kernels.swiglu_backward(
        kernels.rows(d_y, w2, counts), z, scores, gating, counts.sum()
    )
    d_w2 = kernels.weights(d_y, act, counts)
    del act
    d_w13 = kernels.weights(d_z, _gather(rows, tokens), counts).view_as(w13)
    d_rows = kernels.clear_after(kernels.rows(d_z, w13.flatten(1, 2), counts), counts)
    d_b13, d_b2 = _empty_like(None, d_y), _empty_like(None, d_y)
    if b13 is not None:
        d_b13 = _sum_groups(kernels, d_z, None, counts).view_as(b13)
    if b2 is not None:
        d_b2 = _sum_groups(kernels, d_y, scores, counts)
    if scores is None:
        return d_rows, d_w13, d_w2, d_b13, d_b2, _empty_like(None, d_y)
    if b2 is not None:
        wide = d_y.to(_wide(d_y))
        d_scores += (wide * _per_row(b2, counts, len(d_y))).sum(1).to(scores.dtype)
    return d_rows, d_w13, d_w2, d_b13, d_b2, kernels.clear_after(d_scores, counts)


def _gather(rows: Tensor, tokens: Tensor | None) -> Tensor:
    return rows if tokens is None else take_rows(rows, tokens)


def _per_row(bias: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """(R, N) of each row's expert's bias (e, N); rows of no expert get the last one."""
    index = torch.arange(num_rows, device=bias.device)
    experts = torch.searchsorted(counts.cumsum(0), index, right=True)
    return bias.index_select(0, experts.clamp(max=len(bias) - 1))


def _sum_groups(kernels: Kernels, x: Tensor, factors: Tensor | None, counts: Tensor) -> Tensor:
    """Sums of x (R, N), weighted by factors (R,), over each expert's rows: (e, N).

    As a matrix product that quantizes nothing: deterministic, and without unused rows. 16 bytes is
    its narrowest operand.
    """
    ones = x.new_ones(len(x), 16 // x.itemsize)
    column = ones if factors is None else (ones * factors.unsqueeze(1)).to(x.dtype)
    return (kernels.exact or kernels).weights(x, column, counts)[..., 0].contiguous()


def _parts(num_rows: int, counts: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows, `size` at most, and how many of them each expert has; no device sync."""
    ends = counts.cumsum(0)
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        bounds = torch.cat([ends.new_zeros(1), ends]).clamp(start, stop)
        yield slice(start, stop), bounds.diff()


def _no_rows(rows: Tensor, w13: Tensor) -> Tensor:
    """The pre-activation where it is not kept."""
    return rows.new_empty(0, 2 * w13.shape[2])


def _empty_like(x: Tensor | None, other: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for x's gradient; nothing where there is no x, since operators return tensors only."""
    return other.new_empty(0) if x is None else torch.empty_like(x, dtype=dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _kernels(backend: str, w13: Tensor) -> Kernels:
    return choose(backend, w13.dtype, w13.device, w13.shape[2], w13.shape[3])


@grouped_experts.register_fake
def _(rows, w13, w2, b13, b2, counts, scores, source, tokens, gating, backend, max_rows):
    z = _no_rows(rows, w13) if max_rows else rows.new_empty(len(rows), 2 * w13.shape[2])
    return rows.new_empty(len(rows), w2.shape[1]), z


@grouped_experts_backward.register_fake
def _(d_y, z, rows, tokens, w13, w2, b13, b2, counts, scores, gating, backend, max_rows):
    like = (_empty_like(x, d_y) for x in (w13, w2, b13, b2, scores))
    return d_y.new_empty(len(d_y), w13.shape[3]), *like


def _save(ctx, inputs, output):
    rows, *weights, counts, scores, source, tokens, ctx.gating, ctx.backend, ctx.max_rows = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    kept = rows if source is None else source
    ctx.save_for_backward(z, kept, tokens, *weights, counts, scores)


def _gradients(ctx, d_y, _):
    z, kept, tokens, *weights, counts, scores = ctx.saved_tensors
    options = ctx.gating, ctx.backend, ctx.max_rows
    d_rows, *d_weights, d_scores = grouped_experts_backward(
        d_y.contiguous(), z, kept, tokens, *weights, counts, scores, *options
    )
    d_weights = (d if weight is not None else None for d, weight in zip(d_weights, weights))
    d_scores = None if scores is None else d_scores
    return d_rows, *d_weights, None, d_scores, None, None, None, None, None


grouped_experts.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.torchtitan.grouped_experts)
def _(rows, w13, *args, out_shape=None, **kwargs) -> int:
    """Multiplications and additions of three products."""
    return 6 * rows[0] * w13[2] * w13[3]


@register_flop_formula(torch.ops.torchtitan.grouped_experts_backward)
def _(d_y, z, rows, tokens, w13, *args, **kwargs) -> int:
    """Two products for each one of forward; and the first one again where z was not kept."""
    again = 4 * (d_y[0] - z[0])
    return (12 * d_y[0] + again) * w13[2] * w13[3]
