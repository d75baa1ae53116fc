"""Many feed-forward layers at once, as one operator: each row goes through its own expert's SwiGLU.

R rows sorted by expert, or T tokens with K rows each, D model, F expert width, e experts. One operator,
because PyTorch's grouped GEMM has kernels for few dtypes under fake tensors and compile; and so that
backward keeps only what it needs: its input, the pre-activation z (R, 2F), scores, and each token's rows.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchtitan.logging import logger, quiet
from torchtitan.ops.expert_kernels import Gathered, Kernels, gather
from torchtitan.ops.quantized_kernels import choose
from torchtitan.ops.rows import invert_rows, sum_rows
from torchtitan.ops.swiglu import Gating
from torchtitan.ops.wide import wide_dtype, widened


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
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    counts: Tensor,
    scores: Tensor | None,
    rows: Tensor | None,
    num_rows: int,
    gating: Sequence[float],
    backend: str,
    max_rows: int,
) -> tuple[Tensor, Tensor]:
    """y = scores * (gated(z) w2^T + b2) (R, D), and z = x w13^T + b13 (R, 2F).

    x (R, D); weights as in `Weights`; counts (e,) int64, whose sum may be below R: after it, y
    is 0 and z undefined. scores (R,) fp32 or None for 1; num_rows is R. With rows (T, K) int32, x has
    T rows, scores are (T, K), each token is its K rows, and the result (T, D) their sum: over k of
    y[rows[t, k]]. `gating` has the fields of `Gating`. At most max_rows > 0 rows of intermediates
    exist at a time; z is then empty, computed again in backward.
    """
    weights = Weights(w13, w2, b13, b2)
    kernels = _kernels(backend, weights, max_rows)
    tokens, scores = _by_row(rows, scores, num_rows)
    given = _rows(x, tokens)
    if max_rows:
        y, z = x.new_empty(num_rows, w2.shape[1]), _no_rows(x, w13)
        for part, inside in _parts(num_rows, counts, max_rows):
            scores_in, rows_in = None if scores is None else scores[part], _part_of(given, part)
            y[part], _ = _forward(kernels, rows_in, weights, inside, scores_in, Gating(*gating))
    else:
        y, z = _forward(kernels, given, weights, counts, scores, Gating(*gating))
    return y if rows is None else sum_rows(y, rows), z


@torch.library.custom_op("torchtitan::grouped_experts_backward", mutates_args=())
def grouped_experts_backward(
    d_y: Tensor,
    z: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    counts: Tensor,
    scores: Tensor | None,
    rows: Tensor | None,
    num_rows: int,
    gating: Sequence[float],
    backend: str,
    max_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w13, w2, b13, b2 and scores; empty where there is no such input."""
    weights = Weights(w13, w2, b13, b2)
    kernels = _kernels(backend, weights, max_rows)
    tokens, scores = _by_row(rows, scores, num_rows)
    given, d_given = _rows(x, tokens), _rows(d_y, tokens)
    if max_rows:
        d_rows, *others = _backward_in_parts(
            kernels, d_given, given, weights, counts, scores, Gating(*gating), max_rows
        )
    else:
        d_rows, *others = _backward(
            kernels, d_given, z, given, weights, counts, scores, Gating(*gating)
        )
    if rows is None:
        return d_rows, *others
    *d_weights, d_scores = others
    if scores is not None:
        d_scores = d_scores.index_select(0, rows.flatten()).view_as(rows)
    return sum_rows(d_rows, rows), *d_weights, d_scores


def _by_row(
    rows: Tensor | None, scores: Tensor | None, num_rows: int
) -> tuple[Tensor | None, Tensor | None]:
    """Of each row its token, where it is not x's own, and its score."""
    return (None, scores) if rows is None else invert_rows(rows, scores, num_rows)


def _forward(
    kernels: Kernels,
    rows: Gathered | Tensor,
    weights: Weights,
    counts: Tensor,
    scores: Tensor | None,
    gating: Gating,
) -> tuple[Tensor, Tensor]:
    w13, w2, _, b2 = weights
    if not _height(rows):
        return w2.new_empty(0, w2.shape[1]), _no_rows(w2, w13)
    rows = kernels.operand(rows)
    if kernels.up is not None:
        z, act = kernels.up(rows, w13, counts, scores, gating)
    else:
        z = _preactivation(kernels, rows, weights, counts)
        act = kernels.swiglu(z, scores, gating, counts.sum())
    y = kernels.rows(act, w2.mT, counts)
    if b2 is not None:
        bias = _per_row(b2, counts, len(y))
        y += bias if scores is None else (bias * scores.unsqueeze(1)).to(bias.dtype)
    return kernels.clear_after(y, counts), z


def _preactivation(kernels: Kernels, rows: Tensor, weights: Weights, counts: Tensor) -> Tensor:
    z = kernels.rows(rows, weights.w13.flatten(1, 2).mT, counts)
    return z if weights.b13 is None else z + _per_row(weights.b13.flatten(1), counts, len(rows))


def _backward(
    kernels: Kernels,
    d_y: Gathered | Tensor,
    z: Tensor,
    rows: Gathered | Tensor,
    weights: Weights,
    counts: Tensor,
    scores: Tensor | None,
    gating: Gating,
) -> tuple[Tensor, ...]:
    """Gradients of rows, w13, w2, b13, b2 and scores. No tensor of R rows lives longer than used."""
    w13, w2, b13, b2 = weights
    if not len(z):
        of_weights = (_empty_like(weight, z).zero_() for weight in weights)
        return z.new_empty(0, w13.shape[3]), *of_weights, _empty_like(scores, z)
    d_y = kernels.operand(d_y)
    if kernels.down_backward is not None:
        act, d_z, d_scores = kernels.down_backward(d_y, w2, counts, z, scores, gating)
    else:
        d_act = kernels.rows(d_y, w2, counts)
        act, d_z, d_scores = kernels.swiglu_backward(d_act, z, scores, gating, counts.sum())
        del d_act
    d_w2 = kernels.weights(d_y, act, counts)
    d_b2 = _empty_like(None, z) if b2 is None else _sum_groups(kernels, d_y, scores, counts)
    if scores is not None and b2 is not None:
        d_scores += (widened(d_y) * _per_row(b2, counts, len(d_y))).sum(1).to(scores.dtype)
    del act, d_y
    d_w13 = kernels.weights(d_z, kernels.operand(rows), counts).view_as(w13)
    d_rows = kernels.clear_after(kernels.rows(d_z, w13.flatten(1, 2), counts), counts)
    d_b13 = _empty_like(None, z)
    if b13 is not None:
        d_b13 = _sum_groups(kernels, d_z, None, counts).view_as(b13)
    d_scores = _empty_like(None, z) if scores is None else kernels.clear_after(d_scores, counts)
    return d_rows, d_w13, d_w2, d_b13, d_b2, d_scores


def _backward_in_parts(
    kernels: Kernels,
    d_y: Gathered | Tensor,
    rows: Gathered | Tensor,
    weights: Weights,
    counts: Tensor,
    scores: Tensor | None,
    gating: Gating,
    max_rows: int,
) -> tuple[Tensor, ...]:
    """As `_backward`, with at most max_rows rows of intermediates; z is computed again."""
    num_rows, w13 = _height(rows), weights.w13
    d_rows, d_scores = w13.new_empty(num_rows, w13.shape[3]), _empty_like(scores, w13)
    # Many parts may hold rows of one expert: their sum is rounded once.
    sums = [_empty_like(weight, w13, wide_dtype(w13)).zero_() for weight in weights]
    for part, inside in _parts(num_rows, counts, max_rows):
        rows_in, d_y_in = gather(_part_of(rows, part)), _part_of(d_y, part)
        scores_in = None if scores is None else scores[part]
        z_in = _preactivation(kernels, rows_in, weights, inside)
        d_rows[part], *of_weights, d_scores[part] = _backward(
            kernels, d_y_in, z_in, rows_in, weights, inside, scores_in, gating
        )
        for total, term in zip(sums, of_weights, strict=True):
            total += term
    return d_rows, *(total.to(w13.dtype) for total in sums), d_scores


def _rows(x: Tensor, tokens: Tensor | None) -> Gathered | Tensor:
    return x if tokens is None else Gathered(x, tokens)


def _part_of(rows: Gathered | Tensor, part: slice) -> Gathered | Tensor:
    return rows._replace(index=rows.index[part]) if isinstance(rows, Gathered) else rows[part]


def _height(rows: Gathered | Tensor) -> int:
    return len(rows.index if isinstance(rows, Gathered) else rows)


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


def _kernels(backend: str, weights: Weights, max_rows: int) -> Kernels:
    w13, _, *biases = weights
    fusible = not max_rows and biases == [None, None]
    kernels = choose(backend, w13.dtype, w13.device, *w13.shape[2:], fusible=fusible)
    _say(kernels.name, w13.dtype, *w13.shape[2:])
    return kernels


@cache
def _say(name: str, dtype: torch.dtype, hidden: int, dim: int) -> None:
    logger.info(f"experts of width {hidden} x {dim} multiply in {dtype} by {name}")


@contextmanager
def trial() -> Iterator[None]:
    """Around kernels that are only tried: what a run multiplies by is said once it does."""
    try:
        with quiet(logger, logging.WARNING):
            yield
    finally:
        _say.cache_clear()


@grouped_experts.register_fake
def _(x, w13, w2, b13, b2, counts, scores, rows, num_rows, gating, backend, max_rows):
    z = _no_rows(x, w13) if max_rows else x.new_empty(num_rows, 2 * w13.shape[2])
    return x.new_empty(len(x), w2.shape[1]), z


@grouped_experts_backward.register_fake
def _(d_y, z, x, w13, w2, b13, b2, counts, scores, rows, num_rows, gating, backend, max_rows):
    like = (_empty_like(x, d_y) for x in (w13, w2, b13, b2, scores))
    return d_y.new_empty(len(d_y), w13.shape[3]), *like


def _save(ctx, inputs, output):
    *tensors, ctx.num_rows, ctx.gating, ctx.backend, ctx.max_rows = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)  # z's would be zeros of its size
    ctx.save_for_backward(z, *tensors)


def _gradients(ctx, d_y, _):
    z, *operands = ctx.saved_tensors  # once: checkpointing unpacks them only once
    d_x, *d_weights, d_scores = grouped_experts_backward(
        d_y.contiguous(), z, *operands, ctx.num_rows, ctx.gating, ctx.backend, ctx.max_rows
    )
    _, *weights, _, scores, _ = operands
    d_weights = (d if weight is not None else None for d, weight in zip(d_weights, weights))
    d_scores = None if scores is None else d_scores
    return d_x, *d_weights, None, d_scores, None, None, None, None, None


grouped_experts.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.torchtitan.grouped_experts)
def _(x, w13, w2, b13, b2, counts, scores, rows, num_rows, *args, out_shape=None, **kwargs) -> int:
    """Multiplications and additions of three products."""
    return 6 * num_rows * w13[2] * w13[3]


@register_flop_formula(torch.ops.torchtitan.grouped_experts_backward)
def _(d_y, z, x, w13, w2, b13, b2, counts, scores, rows, num_rows, *args, **kwargs) -> int:
    """Two products for each one of forward; and the first one again where z was not kept."""
    again = 4 * (num_rows - z[0])
    return (12 * num_rows + again) * w13[2] * w13[3]
