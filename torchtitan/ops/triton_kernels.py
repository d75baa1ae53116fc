"""Triton kernels of the MoE layer's passes over memory; what each computes is its reference's to say.

Imported on first use on a GPU: PyTorch for CPUs comes without Triton. All arithmetic is in fp32.
"""

import torch
import triton
import triton.language as tl

from torchtitan.ops.swiglu import Gating

_MAX_BLOCK = 2048


def sum_rows(y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As ops/rows.py's `sum_rows`."""
    num_tokens, top_k = rows.shape
    out = y.new_empty(num_tokens, y.shape[1])
    if num_tokens:
        block = _block(y.shape[1])
        _sum_rows[(num_tokens,)](y, rows, out, y.shape[1], *y.stride(), top_k, block)
    return out


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """As ops/rows.py's `take_rows`."""
    out = x.new_empty(len(index), x.shape[1])
    if len(index):
        _take_rows[(len(index),)](x, index, out, x.shape[1], *x.stride(), _block(x.shape[1]))
    return out


def invert_rows(
    rows: torch.Tensor,
    scores: torch.Tensor | None,
    tokens: torch.Tensor,
    by_row: torch.Tensor | None,
) -> None:
    """As ops/rows.py's `invert_rows`, into tokens and by_row."""
    size, block = rows.numel(), 1024
    if size:
        scores = None if scores is None else scores.contiguous()
        _invert_rows[(triton.cdiv(size, block),)](
            rows.contiguous(), scores, tokens, by_row, size, rows.shape[1], block
        )


def clear_after(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """As ops/expert_kernels.py's `clear_after`; reads the counts, writes only what is to be zero."""
    if len(x):
        rows, width = 64, x[0].numel()
        experts = triton.next_power_of_2(len(counts))
        grid = (triton.cdiv(len(x), rows),)
        _clear_after[grid](x, counts, len(counts), len(x), width, experts, rows, _block(min(width, 256)))
    return x


def swiglu(
    z: torch.Tensor,
    scores: torch.Tensor | None,
    gating: Gating,
    num_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ops/swiglu.py's `swiglu`."""
    out = z.new_empty(len(z), z.shape[1] // 2)
    if len(z):
        width = out.shape[1]
        options = width, scores is not None, num_rows is not None, _block(width)
        _swiglu[(len(z),)](z, scores, out, num_rows, *gating, *options)
    return out


def swiglu_backward(
    d_act: torch.Tensor,
    z: torch.Tensor,
    scores: torch.Tensor | None,
    gating: Gating,
    num_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As ops/swiglu.py's `swiglu_backward`."""
    act, d_z = torch.empty_like(d_act), torch.empty_like(z)
    d_scores = None if scores is None else torch.empty_like(scores)
    if len(z):
        width = d_act.shape[1]
        options = width, scores is not None, num_rows is not None, _block(width)
        _swiglu_backward[(len(z),)](
            d_act, z, scores, act, d_z, d_scores, num_rows, *gating, *options
        )
    return act, d_z, d_scores


def grouped_product(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """As ops/row_products.py's `grouped_product`.

    Tiles and the order of sums depend on the dtype alone, and no sum is split.
    """
    (num_rows, width), (num_groups, _, out_width) = a.shape, b.shape
    out = a.new_empty(num_rows, out_width)
    if num_rows:
        rows, columns, depth = (64, 64, 32) if a.dtype == torch.float32 else (128, 128, 64)
        # Every group may leave one tile of rows half empty.
        grid = triton.cdiv(num_rows, rows) + num_groups, triton.cdiv(out_width, columns)
        sizes = num_groups, width, out_width, triton.next_power_of_2(num_groups)
        strides = *a.stride(), *b.stride()
        _grouped_product[grid](
            a, b, out, counts, *sizes, *strides, rows, columns, depth, num_warps=8, num_stages=3
        )
    return out


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """As ops/top_k.py's `top_k`."""
    num_rows, num_columns = scores.shape
    out = torch.empty(num_rows, k, dtype=torch.int64, device=scores.device)
    columns = triton.next_power_of_2(num_columns)
    rows = max(1, 4096 // columns)  # 32 values a thread
    if num_rows:
        _top_k[(triton.cdiv(num_rows, rows),)](scores, out, num_rows, num_columns, k, columns, rows)
    return out


def _block(width: int) -> int:
    return min(_MAX_BLOCK, triton.next_power_of_2(width))


@triton.jit
def _sum_rows(
    y,
    rows,
    out,
    width: tl.constexpr,
    y_stride,
    column_stride: tl.constexpr,
    top_k: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        total = tl.zeros([block], dtype=tl.float32)
        for k in range(top_k):
            row = tl.load(rows + token * top_k + k).to(tl.int64)
            present = inside & (row >= 0)
            at = y + row * y_stride + columns * column_stride
            total += tl.load(at, present, other=0.0).to(tl.float32)
        tl.store(out + token * width + columns, total.to(out.dtype.element_ty), inside)


@triton.jit
def _invert_rows(
    rows,
    scores,
    tokens,
    by_row,
    size,
    top_k: tl.constexpr,
    block: tl.constexpr,
):
    choice = tl.program_id(0) * block + tl.arange(0, block)
    inside = choice < size
    row = tl.load(rows + choice, inside)
    tl.store(tokens + row, choice // top_k, inside)
    if scores is not None:
        tl.store(by_row + row, tl.load(scores + choice, inside), inside)


@triton.jit
def _grouped_product(
    a,
    b,
    out,
    counts,
    num_groups,
    width,
    out_width,
    groups: tl.constexpr,
    a_row,
    a_column,
    b_group,
    b_row,
    b_column,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
):
    # Tiles of rows are those of group 0, of group 1, ...: which one is this?
    tile = tl.program_id(0)
    index = tl.arange(0, groups)
    sizes = tl.load(counts + index, index < num_groups, other=0)
    tiles = (sizes + tile_rows - 1) // tile_rows
    group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if group < num_groups:
        before = index < group
        inside = (tile - tl.sum(tl.where(before, tiles, 0), 0)) * tile_rows + tl.arange(0, tile_rows)
        size = tl.sum(tl.where(index == group, sizes, 0), 0)
        rows = tl.sum(tl.where(before, sizes, 0), 0) + inside
        columns = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
        depth = tl.arange(0, tile_depth)
        used_rows, used_columns = (inside < size)[:, None], (columns < out_width)[None, :]
        at_a = a + rows[:, None].to(tl.int64) * a_row
        at_b = b + group.to(tl.int64) * b_group + columns[None, :].to(tl.int64) * b_column
        total = tl.zeros([tile_rows, tile_columns], dtype=tl.float32)
        for start in range(0, width, tile_depth):
            k = start + depth
            left = tl.load(at_a + k[None, :] * a_column, used_rows & (k < width)[None, :], other=0.0)
            right = tl.load(
                at_b + k[:, None].to(tl.int64) * b_row, used_columns & (k < width)[:, None], other=0.0
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        at_out = out + rows[:, None].to(tl.int64) * out_width + columns[None, :]
        tl.store(at_out, total.to(out.dtype.element_ty), used_rows & used_columns)


@triton.jit
def _clear_after(
    x,
    counts,
    num_experts,
    num_rows,
    width: tl.constexpr,
    experts: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    first = tl.program_id(0) * block_rows
    expert = tl.arange(0, experts)
    used = tl.sum(tl.load(counts + expert, expert < num_experts, other=0))
    if first + block_rows > used:
        rows = first + tl.arange(0, block_rows)[:, None]
        zeros = tl.zeros([block_rows, block], dtype=x.dtype.element_ty)
        for start in range(0, width, block):
            columns = start + tl.arange(0, block)[None, :]
            inside = (rows >= used) & (rows < num_rows) & (columns < width)
            tl.store(x + rows.to(tl.int64) * width + columns, zeros, inside)


@triton.jit
def _clamp(gate, up, limit: tl.constexpr):
    # By default NaN gives way to the limit: what is not finite would be hidden.
    nan: tl.constexpr = tl.PropagateNan.ALL
    up = tl.maximum(up, -limit, propagate_nan=nan)
    return tl.minimum(gate, limit, propagate_nan=nan), tl.minimum(up, limit, propagate_nan=nan)


@triton.jit
def gated(gate, up, alpha: tl.constexpr, limit: tl.constexpr, up_offset: tl.constexpr):
    """`Gating` of fp32 gate and up."""
    gate, up = _clamp(gate, up, limit)
    return gate * tl.sigmoid(alpha * gate) * (up + up_offset)


@triton.jit
def gated_backward(
    gradient, gate, up, score, alpha: tl.constexpr, limit: tl.constexpr, up_offset: tl.constexpr
):
    """From the fp32 gradient of `gated` times score: that, d_gate, d_up, and d_score by element."""
    gate_passes, up_passes = gate <= limit, tl.abs(up) <= limit
    gate, up = _clamp(gate, up, limit)
    sigmoid, up = tl.sigmoid(alpha * gate), up + up_offset
    glu = gate * sigmoid
    d_score = gradient * glu * up
    gradient = gradient * score
    d_gate = gradient * up * (sigmoid + alpha * glu * (1 - sigmoid))
    d_gate, d_up = tl.where(gate_passes, d_gate, 0.0), tl.where(up_passes, gradient * glu, 0.0)
    return glu * up * score, d_gate, d_up, d_score


@triton.jit
def _swiglu(
    z,
    scores,
    out,
    num_rows,
    alpha: tl.constexpr,
    limit: tl.constexpr,
    up_offset: tl.constexpr,
    width: tl.constexpr,
    weighted: tl.constexpr,
    bounded: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if bounded:
        if row >= tl.load(num_rows):
            return
    score = tl.load(scores + row) if weighted else 1.0
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        gate = tl.load(z + row * 2 * width + columns, inside, other=0.0).to(tl.float32)
        up = tl.load(z + row * 2 * width + width + columns, inside, other=0.0).to(tl.float32)
        act = gated(gate, up, alpha, limit, up_offset) * score
        tl.store(out + row * width + columns, act.to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(
    d_act,
    z,
    scores,
    act,
    d_z,
    d_scores,
    num_rows,
    alpha: tl.constexpr,
    limit: tl.constexpr,
    up_offset: tl.constexpr,
    width: tl.constexpr,
    weighted: tl.constexpr,
    bounded: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if bounded:
        if row >= tl.load(num_rows):
            return
    score = tl.load(scores + row) if weighted else 1.0
    d_score = tl.zeros([block], dtype=tl.float32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        gate = tl.load(z + row * 2 * width + columns, inside, other=0.0).to(tl.float32)
        up = tl.load(z + row * 2 * width + width + columns, inside, other=0.0).to(tl.float32)
        gradient = tl.load(d_act + row * width + columns, inside, other=0.0).to(tl.float32)
        result, d_gate, d_up, of_score = gated_backward(
            gradient, gate, up, score, alpha, limit, up_offset
        )
        d_score += of_score
        tl.store(act + row * width + columns, result.to(act.dtype.element_ty), inside)
        at = d_z + row * 2 * width + columns
        tl.store(at, d_gate.to(d_z.dtype.element_ty), inside)
        tl.store(at + width, d_up.to(d_z.dtype.element_ty), inside)
    if weighted:
        tl.store(d_scores + row, tl.sum(d_score))


@triton.jit
def _take_rows(
    x,
    index,
    out,
    width: tl.constexpr,
    x_stride: tl.constexpr,  # known, since what it divides by decides how wide loads are
    column_stride: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row).to(tl.int64)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        at = x + source * x_stride + columns * column_stride
        tl.store(out + row * width + columns, tl.load(at, inside & (source >= 0), other=0), inside)


@triton.jit
def _top_k(
    scores,
    out,
    num_rows,
    num_columns,
    k: tl.constexpr,
    columns: tl.constexpr,
    rows: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)[None, :]
    inside = (row < num_rows)[:, None] & (column < num_columns)
    left = tl.load(scores + row[:, None] * num_columns + column, inside, other=float("-inf"))
    left = tl.where(left != left, float("inf"), left)  # no comparison finds NaN, nor a column there is
    for i in range(k):
        best = tl.argmax(left, axis=1)
        tl.store(out + row * k + i, best.to(tl.int64), row < num_rows)
        left = tl.where(column == best[:, None], float("-inf"), left)
