"""Triton kernels of experts' products, with gathers and gating inside of them; see ops/expert_kernels.py.

T tokens, R rows sorted by expert, e experts, D model, F expert width, M, N and K widths. What is gathered
while it is multiplied is never written, and z and d_z are gated where their sums lie: that, not the
product, is what these win. Tensors are contiguous unless said, widths multiples of `BLOCK`, indices
of rows that exist; sums are in fp32. Imported on first use on a GPU: PyTorch for CPUs comes
without Triton.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from torchtitan.ops.swiglu import Gating
from torchtitan.ops.triton_kernels import gated, gated_backward

BLOCK = 128
"""Rows, or the narrower side, of a tile of results: what two groups of warps hold in registers."""

_WIDE = 256
"""The wider side of a tile whose operand there comes by TMA."""

_STEP = 64
"""Columns summed at a time: whole 128-byte lines of bf16."""

_ROWS = 32
"""Rows summed at a time. Where the index is read in the loop, many small steps in flight win: 640 TFLOP/s,
against 609 for steps of 64."""


def up(
    x: torch.Tensor,
    index: torch.Tensor | None,
    w13: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor | None,
    gating: Gating,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Kernels.up`: z = x[index] w13^T (R, 2F) and its gated activation (R, F), in one pass."""
    num_experts, _, width, dim = w13.shape
    num_rows = len(x if index is None else index)
    z, act = x.new_empty(num_rows, 2 * width), x.new_empty(num_rows, width)
    tiles, _ = _tiles(counts, num_rows)
    w13 = _tma(w13.reshape(-1, dim), BLOCK, _STEP)
    grid = (len(tiles) * (width // BLOCK),)
    _grouped_up[grid](
        x, index, w13, scores, tiles, z, act, *gating,
        dim, width, BLOCK, _STEP, num_warps=8, num_stages=4,
    )  # fmt: skip
    return z, act


def rows(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """As `Kernels.rows`: a (R, K), b (e, K, N) with K or N contiguous -> (R, N)."""
    _, depth, width = b.shape
    out = a.new_empty(len(a), width)
    tiles, num_tiles = _tiles(counts, len(a))
    by_column = b.stride(1) == 1
    if by_column:
        b = _tma(b.mT.reshape(-1, depth), _WIDE, _STEP)
    else:
        b = _tma(b.reshape(-1, width), _STEP, _WIDE)
    # One program a multiprocessor: it loads for its next tile while it stores the last one.
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 3
    _grouped_rows[(programs,)](
        _tma(a, BLOCK, _STEP), b, tiles, num_tiles, out,
        depth, width, by_column, BLOCK, _WIDE, _STEP, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def down_backward(
    d_y: torch.Tensor,
    index: torch.Tensor | None,
    w2: torch.Tensor,
    counts: torch.Tensor,
    z: torch.Tensor,
    scores: torch.Tensor | None,
    gating: Gating,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `Kernels.down_backward`: `swiglu_backward` of d_y[index] w2, in one pass."""
    _, dim, width = w2.shape
    num_rows, num_columns = len(z), width // BLOCK
    act, d_z = z.new_empty(num_rows, width), torch.empty_like(z)
    d_scores = None if scores is None else scores.new_empty(num_columns, num_rows)
    tiles, _ = _tiles(counts, num_rows)
    # Two programs a multiprocessor: one multiplies while the other one gates.
    _grouped_down_backward[(len(tiles) * num_columns,)](
        d_y, index, _tma(w2.reshape(-1, width), _STEP, BLOCK), tiles, z, scores, act, d_z, d_scores,
        num_rows, *gating, dim, width, BLOCK, _STEP, num_warps=8, num_stages=3,
    )  # fmt: skip
    return act, d_z, None if scores is None else d_scores.sum(0)


def weights(
    a: torch.Tensor,
    index: torch.Tensor,
    b: torch.Tensor,
    counts: torch.Tensor,
    transposed: bool = False,
) -> torch.Tensor:
    """a[index]^T b over each group's rows: (T, M), (R, N) -> (e, M, N), or `transposed` (e, N, M)."""
    num_experts, height, width = len(counts), a.shape[1], b.shape[1]
    shape = (width, height) if transposed else (height, width)
    out = a.new_empty(num_experts, *shape)
    grid = (num_experts * (height // BLOCK) * triton.cdiv(width, _WIDE),)
    _grouped_weights[grid](
        a, index, b, _tma(b, _ROWS, _WIDE), counts.cumsum(0), out,
        height, width, transposed, BLOCK, _WIDE, _ROWS, num_warps=8, num_stages=8,
    )  # fmt: skip
    return out


def _tma(matrix: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [height, width])


def _tiles(counts: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where `BLOCK` rows of one expert lie: (tiles, 3) int32 of expert, first row, stop; and how many.

    The host does not know the counts: there is room for as many tiles as there can be, however rows
    are spread, and those that there are not stop at 0. Their number is (1,) int32.
    """
    num_tiles = triton.cdiv(num_rows, BLOCK) + len(counts)
    tiles = torch.empty(num_tiles, 3, dtype=torch.int32, device=counts.device)
    num_used = torch.empty(1, dtype=torch.int32, device=counts.device)
    experts, programs = triton.next_power_of_2(len(counts)), 32
    grid = (triton.cdiv(num_tiles, programs),)
    _fill_tiles[grid](counts, tiles, num_used, len(counts), num_tiles, experts, BLOCK, programs)
    return tiles, num_used


@triton.jit
def _fill_tiles(
    counts,
    tiles,
    num_used,
    num_experts,
    num_tiles,
    experts: tl.constexpr,
    block: tl.constexpr,
    num_here: tl.constexpr,
):
    expert = tl.arange(0, experts)
    count = tl.load(counts + expert, expert < num_experts, other=0).to(tl.int32)
    num_of_expert = tl.cdiv(count, block)
    ends = tl.cumsum(num_of_expert)
    tile = tl.program_id(0) * num_here + tl.arange(0, num_here)
    mine = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    is_mine = expert[None, :] == mine[:, None]  # of none for tiles past the last
    of_expert = tile - tl.sum(tl.where(is_mine, (ends - num_of_expert)[None, :], 0), axis=1)
    stop = tl.sum(tl.where(is_mine, tl.cumsum(count)[None, :], 0), axis=1)
    start = stop - tl.sum(tl.where(is_mine, count[None, :], 0), axis=1)
    tl.store(num_used, tl.sum(num_of_expert))  # all programs the same
    inside = tile < num_tiles
    tl.store(tiles + tile * 3, mine, inside)
    tl.store(tiles + tile * 3 + 1, start + of_expert * block, inside)
    tl.store(tiles + tile * 3 + 2, stop, inside)


@triton.jit
def _tile(tiles, tile):
    at = tiles + tile * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _grouped_up(
    x,
    index,
    w13,
    scores,
    tiles,
    z,
    act,
    alpha: tl.constexpr,
    limit: tl.constexpr,
    up_offset: tl.constexpr,
    dim: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    step: tl.constexpr,
):
    # Columns vary fastest: an expert's weights stay in L2 while its rows pass by once.
    num_columns: tl.constexpr = width // block
    tile, column = tl.program_id(0) // num_columns, tl.program_id(0) % num_columns * block
    expert, first, stop = _tile(tiles, tile)
    if first < stop:
        row = first + tl.arange(0, block)
        inside = row < stop
        # Rows outside read some row that exists, and are not stored.
        source = tl.minimum(row, stop - 1) if index is None else tl.load(index + row, inside, other=0)
        a_at = x + source.to(tl.int64)[:, None] * dim + tl.arange(0, step)[None, :]
        gate_row = expert * 2 * width + column
        gate = tl.zeros([block, block], dtype=tl.float32)
        up = tl.zeros([block, block], dtype=tl.float32)
        for k in range(0, dim, step):
            a = tl.load(a_at + k)
            gate = tl.dot(a, w13.load([gate_row, k]).T, gate)
            up = tl.dot(a, w13.load([gate_row + width, k]).T, up)
        # Rounded before the gating, as backward will find it.
        gate, up = gate.to(z.dtype.element_ty), up.to(z.dtype.element_ty)
        columns = column + tl.arange(0, block)[None, :]
        z_at = z + row.to(tl.int64)[:, None] * (2 * width) + columns
        tl.store(z_at, gate, inside[:, None])
        tl.store(z_at + width, up, inside[:, None])
        result = gated(gate.to(tl.float32), up.to(tl.float32), alpha, limit, up_offset)
        if scores is not None:
            result *= tl.load(scores + row, inside, other=0.0)[:, None]
        act_at = act + row.to(tl.int64)[:, None] * width + columns
        tl.store(act_at, result.to(act.dtype.element_ty), inside[:, None])


@triton.jit
def _grouped_down_backward(
    d_y,
    index,
    w2,
    tiles,
    z,
    scores,
    act,
    d_z,
    d_scores,
    num_rows,
    alpha: tl.constexpr,
    limit: tl.constexpr,
    up_offset: tl.constexpr,
    dim: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    step: tl.constexpr,
):
    num_columns: tl.constexpr = width // block
    tile, column = tl.program_id(0) // num_columns, tl.program_id(0) % num_columns * block
    expert, first, stop = _tile(tiles, tile)
    if first < stop:
        row = first + tl.arange(0, block)
        inside = row < stop
        source = tl.minimum(row, stop - 1) if index is None else tl.load(index + row, inside, other=0)
        a_at = d_y + source.to(tl.int64)[:, None] * dim + tl.arange(0, step)[None, :]
        total = tl.zeros([block, block], dtype=tl.float32)
        for k in range(0, dim, step):
            total = tl.dot(tl.load(a_at + k), w2.load([expert * dim + k, column]), total)
        score = 1.0 if scores is None else tl.load(scores + row, inside, other=0.0)[:, None]
        d_score = tl.zeros([block], dtype=tl.float32)
        parts = _quarters(total)
        part: tl.constexpr = block // 4
        for quarter in tl.static_range(4):
            columns = column + quarter * part + tl.arange(0, part)[None, :]
            at = row.to(tl.int64)[:, None] * (2 * width) + columns
            gate = tl.load(z + at, inside[:, None], other=0.0).to(tl.float32)
            up = tl.load(z + at + width, inside[:, None], other=0.0).to(tl.float32)
            result, d_gate, d_up, of_score = gated_backward(
                parts[quarter], gate, up, score, alpha, limit, up_offset
            )
            d_score += tl.sum(of_score, axis=1)
            act_at = act + row.to(tl.int64)[:, None] * width + columns
            tl.store(act_at, result.to(act.dtype.element_ty), inside[:, None])
            tl.store(d_z + at, d_gate.to(d_z.dtype.element_ty), inside[:, None])
            tl.store(d_z + at + width, d_up.to(d_z.dtype.element_ty), inside[:, None])
        if scores is not None:
            at_tile = d_scores + (tl.program_id(0) % num_columns).to(tl.int64) * num_rows
            tl.store(at_tile + row, d_score, inside)


@triton.jit
def _quarters(tile):
    """The columns of a tile in four parts, each of neighbours."""
    left, right = _halves(tile)
    a, b = _halves(left)
    c, d = _halves(right)
    return a, b, c, d


@triton.jit
def _halves(tile):
    height: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tile.reshape(height, 2, half).permute(0, 2, 1))


@triton.jit
def _grouped_rows(
    a,
    b,
    tiles,
    num_tiles,
    out,
    depth: tl.constexpr,
    width: tl.constexpr,
    by_column: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    step: tl.constexpr,
):
    num_columns: tl.constexpr = (width + wide - 1) // wide
    stop_at = tl.load(num_tiles) * num_columns
    for place in tl.range(tl.program_id(0), stop_at, tl.num_programs(0), flatten=True):
        tile, column = place // num_columns, place % num_columns * wide
        expert, first, stop = _tile(tiles, tile)
        total = tl.zeros([block, wide], dtype=tl.float32)
        for k in range(0, depth, step):
            if by_column:
                matrix = b.load([expert * width + column, k]).T
            else:
                matrix = b.load([expert * depth + k, column])
            total = tl.dot(a.load([first, k]), matrix, total)
        row = first + tl.arange(0, block)
        columns = column + tl.arange(0, wide)[None, :]
        at = out + row.to(tl.int64)[:, None] * width + columns
        tl.store(at, total.to(out.dtype.element_ty), (row < stop)[:, None] & (columns < width))


@triton.jit
def _grouped_weights(
    a,
    index,
    b,
    b_tiles,
    ends,
    out,
    height: tl.constexpr,
    width: tl.constexpr,
    transposed: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    step: tl.constexpr,
):
    num_columns: tl.constexpr = (width + wide - 1) // wide
    num_tiles: tl.constexpr = (height // block) * num_columns
    expert, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    line, column = tile // num_columns * block, tile % num_columns * wide
    start = tl.load(ends + expert - 1, expert > 0, other=0).to(tl.int32)
    stop = tl.load(ends + expert).to(tl.int32)
    whole = start + (stop - start) // step * step
    lines, columns = line + tl.arange(0, block), column + tl.arange(0, wide)
    total = tl.zeros([block, wide], dtype=tl.float32)
    for first in range(start, whole, step):
        source = tl.load(index + first + tl.arange(0, step)).to(tl.int64)
        gathered = tl.load(a + source[:, None] * height + lines[None, :])
        total = tl.dot(gathered.T, b_tiles.load([first, column]), total)
    if whole < stop:
        # The next rows are of another expert, or of none and not even numbers: nothing may read them.
        row = whole + tl.arange(0, step)
        inside = row < stop
        token = tl.load(index + row, inside, other=0).to(tl.int64)
        last_a = tl.load(a + token[:, None] * height + lines[None, :], inside[:, None], other=0.0)
        b_at = b + row.to(tl.int64)[:, None] * width + columns[None, :]
        last_b = tl.load(b_at, inside[:, None] & (columns < width)[None, :], other=0.0)
        total = tl.dot(last_a.T, last_b, total)
    at = out + expert.to(tl.int64) * height * width
    if transposed:
        at += columns[None, :] * height + lines[:, None]
    else:
        at += lines[:, None] * width + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), (columns < width)[None, :])
