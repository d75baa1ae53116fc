"""Many feed-forward layers at once, as one operator: each row goes through its own expert's SwiGLU.

R rows sorted by expert, D model, F expert width, e experts. One operator, because PyTorch's grouped
GEMM has kernels for few dtypes under fake tensors and compile; and so that backward keeps only what
it needs: the rows (or where they were gathered from), the pre-activation z (R, 2F) and scores.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchtitan.ops.expert_kernels import Kernels, choose


@torch.library.custom_op("torchtitan::grouped_experts", mutates_args=())
def grouped_experts(
    rows: Tensor,
    w13: Tensor,
    w2: Tensor,
    counts: Tensor,
    scores: Tensor | None,
    source: Tensor | None,
    tokens: Tensor | None,
    backend: str,
    max_rows: int,
) -> tuple[Tensor, Tensor]:
    """y = (silu(gate) * up * scores) w2^T (R, D), and z = (gate, up) = rows w13^T (R, 2F).

    rows (R, D); w13 (e, 2, F, D), gate before up; w2 (e, D, F); counts (e,) int64, whose sum may be
    below R: after it, y is 0 and z undefined. scores (R,) fp32 or None for 1. rows = source[tokens]
    where those are given, and backward keeps them in place of rows. At most max_rows > 0 rows of
    intermediates exist at a time; z is then empty and computed again in backward.
    """
    kernels = _kernels(backend, w13)
    if not max_rows:
        return _forward(kernels, rows, w13, w2, counts, scores)
    y = rows.new_empty(len(rows), w2.shape[1])
    for part, inside in _parts(len(rows), counts, max_rows):
        y[part], _ = _forward(kernels, rows[part], w13, w2, inside, _at(scores, part))
    return y, _no_rows(rows, w13)


@torch.library.custom_op("torchtitan::grouped_experts_backward", mutates_args=())
def grouped_experts_backward(
    d_y: Tensor,
    z: Tensor,
    rows: Tensor,
    tokens: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    counts: Tensor,
    scores: Tensor | None,
    backend: str,
    max_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows (R, D), w13, w2 and scores (R,), the last one empty where scores is None.

    With `tokens` given, `rows` is the tensor that they index.
    """
    kernels = _kernels(backend, w13)
    if not max_rows:
        rows = rows if tokens is None else rows.index_select(0, tokens)
        return _backward(kernels, d_y, z, rows, w13, w2, counts, scores)
    d_rows = d_y.new_empty(len(d_y), w13.shape[3])
    d_scores = _no_scores(d_y) if scores is None else torch.empty_like(scores)
    # Many parts may hold rows of one expert: their sum is rounded once.
    d_w13, d_w2 = (w.new_zeros(w.shape, dtype=_wide(w)) for w in (w13, w2))
    for part, inside in _parts(len(d_y), counts, max_rows):
        rows_in = rows[part] if tokens is None else rows.index_select(0, tokens[part])
        z_in = kernels.rows(rows_in, w13.flatten(1, 2).mT, inside)
        of_part = _backward(kernels, d_y[part], z_in, rows_in, w13, w2, inside, _at(scores, part))
        d_rows[part] = of_part[0]
        d_w13 += of_part[1]
        d_w2 += of_part[2]
        if scores is not None:
            d_scores[part] = of_part[3]
    return d_rows, d_w13.to(w13.dtype), d_w2.to(w2.dtype), d_scores


def _forward(
    kernels: Kernels, rows: Tensor, w13: Tensor, w2: Tensor, counts: Tensor, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not len(rows):
        return rows.new_empty(0, w2.shape[1]), _no_rows(rows, w13)
    z = kernels.rows(rows, w13.flatten(1, 2).mT, counts)
    y = kernels.rows(kernels.swiglu(z, scores), w2.mT, counts)
    return y.masked_fill_(_after(counts, y), 0), z


def _backward(
    kernels: Kernels,
    d_y: Tensor,
    z: Tensor,
    rows: Tensor,
    w13: Tensor,
    w2: Tensor,
    counts: Tensor,
    scores: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not len(rows):
        return torch.empty_like(rows), torch.zeros_like(w13), torch.zeros_like(w2), _no_scores(d_y)
    act, d_z, d_scores = kernels.swiglu_backward(kernels.rows(d_y, w2, counts), z, scores)
    d_w2 = kernels.weights(d_y, act, counts)
    d_w13 = kernels.weights(d_z, rows, counts).view_as(w13)
    d_rows = kernels.rows(d_z, w13.flatten(1, 2), counts)
    after = _after(counts, d_rows)
    d_scores = _no_scores(d_y) if d_scores is None else d_scores.masked_fill_(after.squeeze(1), 0)
    return d_rows.masked_fill_(after, 0), d_w13, d_w2, d_scores


def _after(counts: Tensor, rows: Tensor) -> Tensor:
    """(R, 1): which rows belong to no expert. Nothing has written them."""
    return (torch.arange(len(rows), device=rows.device) >= counts.sum()).unsqueeze(1)


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


def _no_scores(d_y: Tensor) -> Tensor:
    """The gradient of scores that are not there: operators return tensors only."""
    return d_y.new_empty(0, dtype=torch.float32)


def _at(scores: Tensor | None, part: slice) -> Tensor | None:
    return None if scores is None else scores[part]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _kernels(backend: str, w13: Tensor) -> Kernels:
    return choose(backend, w13.dtype, w13.device, w13.shape[2], w13.shape[3])


@grouped_experts.register_fake
def _(rows, w13, w2, counts, scores, source, tokens, backend, max_rows):
    z = _no_rows(rows, w13) if max_rows else rows.new_empty(len(rows), 2 * w13.shape[2])
    return rows.new_empty(len(rows), w2.shape[1]), z


@grouped_experts_backward.register_fake
def _(d_y, z, rows, tokens, w13, w2, counts, scores, backend, max_rows):
    d_scores = _no_scores(d_y) if scores is None else torch.empty_like(scores)
    d_rows = d_y.new_empty(len(d_y), w13.shape[3])
    return d_rows, torch.empty_like(w13), torch.empty_like(w2), d_scores


def _save(ctx, inputs, output):
    rows, w13, w2, counts, scores, source, tokens, ctx.backend, ctx.max_rows = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    kept = rows if source is None else source
    ctx.save_for_backward(z, kept, tokens, w13, w2, counts, scores)


def _gradients(ctx, d_y, _):
    z, kept, tokens, w13, w2, counts, scores = ctx.saved_tensors
    d_rows, d_w13, d_w2, d_scores = grouped_experts_backward(
        d_y.contiguous(), z, kept, tokens, w13, w2, counts, scores, ctx.backend, ctx.max_rows
    )
    d_scores = None if scores is None else d_scores
    return d_rows, d_w13, d_w2, None, d_scores, None, None, None, None


grouped_experts.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.torchtitan.grouped_experts)
def _(rows, w13, *args, out_shape=None, **kwargs) -> int:
    """Multiplications and additions of three kernels."""
    return 6 * rows[0] * w13[2] * w13[3]


@register_flop_formula(torch.ops.torchtitan.grouped_experts_backward)
def _(d_y, z, rows, tokens, w13, w2, counts, scores, backend, max_rows, **kwargs) -> int:
    """Two products for each one of forward; and the first one again where z was not kept."""
    return (12 + (4 if max_rows else 0)) * d_y[0] * w13[2] * w13[3]
