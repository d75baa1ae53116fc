"""Triton kernels that quantize to float8; what each computes is ops/float8.py's to say.

Where columns are quantized, groups begin and end at multiples of 16 rows: their numbers are written
transposed, 16 bytes at a time. Imported on first use on a GPU: PyTorch for CPUs comes without Triton.
"""

import torch
import triton
import triton.language as tl

from torchtitan.ops.float8 import E4M3_MAX, TINY, Quantized

_MAX_BLOCK = 4096
_TILE = 64  # rows and columns of a tile that is transposed
_SIDE_TILE = 128  # the same where it is written both ways: a line of memory, 128 bytes, each way


def quantize_rows(x: torch.Tensor) -> Quantized:
    """As ops/float8.py's `quantize_rows`; x (R, K) may have any stride between rows."""
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    if x.numel():
        width = x.shape[1]
        block = min(_MAX_BLOCK, triton.next_power_of_2(width))
        _quantize_rows[(len(x),)](x, data, scale, width, *x.stride(), E4M3_MAX, TINY, block)
    return Quantized(data, scale)


def quantize_matrices(x: torch.Tensor) -> Quantized:
    """x (G, K, N), row- or column-major, one scale a column: data column-major, scale (G, N)."""
    num_groups, height, width = x.shape
    if x.mT.is_contiguous():
        data, scale = quantize_rows(x.mT.reshape(-1, height))
        return Quantized(data.view(num_groups, width, height).mT, scale.view(num_groups, width))
    ends = torch.arange(height, (num_groups + 1) * height, height, device=x.device)
    data = torch.empty(num_groups, width, height, dtype=torch.float8_e4m3fn, device=x.device)
    scale = _quantize_columns_into(data, x.reshape(-1, width), ends, matrices=True)
    return Quantized(data.mT, scale)


def quantize_group_columns(x: torch.Tensor, counts: torch.Tensor) -> Quantized:
    """As ops/float8.py's `quantize_group_columns`; data (R, N) is column-major, as products want it."""
    data = torch.empty(x.shape[::-1], dtype=torch.float8_e4m3fn, device=x.device)
    return Quantized(data.t(), _quantize_columns_into(data, x, counts.cumsum(0), matrices=False))


def quantize_sides(
    x: torch.Tensor, by_rows: torch.Tensor, by_columns: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ops/float8.py's `quantize_sides`, in one pass."""
    height, width = x.shape
    rows = torch.empty(height, width, dtype=dtype, device=x.device)
    both = by_columns is not None
    columns = torch.empty(width, height, dtype=dtype, device=x.device) if both else None
    of_row, of_column = by_rows.expand(height, 1), (by_columns if both else by_rows[:1]).expand(1, width)
    steps = (*x.stride(), of_row.stride(0), of_column.stride(1))
    grid = (triton.cdiv(width, _SIDE_TILE), triton.cdiv(height, _SIDE_TILE))
    if x.numel():
        _quantize_sides[grid](
            x, rows, columns, of_row, of_column, height, width, *steps, both, _SIDE_TILE, num_warps=16
        )
    return rows, columns


def _quantize_columns_into(
    data: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, matrices: bool
) -> torch.Tensor:
    """data (N, R), or of `matrices` (G, N, R / G), from x (R, N) whose groups end at `ends` (G,)."""
    scale = torch.empty(len(ends), x.shape[1], dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(x.shape[1], _TILE), len(ends))
    sizes = (x.shape[1], data.shape[-1], *x.stride())
    _quantize_columns[grid](x, data, scale, ends, *sizes, E4M3_MAX, TINY, matrices, _TILE)
    return scale


@triton.jit
def _inverse_scale(amax, e4m3_max: tl.constexpr, tiny: tl.constexpr):
    ratio = e4m3_max / tl.maximum(amax, tiny)
    return (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _quantize_rows(
    x,
    data,
    scale,
    width: tl.constexpr,
    x_stride,
    column_stride,
    e4m3_max: tl.constexpr,
    tiny: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    amax = tl.zeros([block], dtype=tl.float32)
    for start in tl.static_range(0, width, block):
        columns = start + tl.arange(0, block)
        part = tl.load(x + columns * column_stride, columns < width, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(part))
    inverse = _inverse_scale(tl.max(amax), e4m3_max, tiny)
    tl.store(scale + row, 1.0 / inverse)
    for start in tl.static_range(0, width, block):
        columns = start + tl.arange(0, block)
        if width > block:  # else it is still at hand
            part = tl.load(x + columns * column_stride, columns < width, other=0.0).to(tl.float32)
        tl.store(data + row * width + columns, (part * inverse).to(tl.float8e4nv), columns < width)


@triton.jit
def _quantize_columns(
    x,
    data,
    scale,
    ends,
    width: tl.constexpr,
    height,
    x_stride,
    column_stride,
    e4m3_max: tl.constexpr,
    tiny: tl.constexpr,
    matrices: tl.constexpr,
    tile: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    first = tl.multiple_of(tl.load(ends + group - 1, group > 0, other=0), 16)
    last = tl.multiple_of(tl.load(ends + group), 16)
    columns = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = columns < width
    amax = tl.zeros([tile, tile], dtype=tl.float32)
    for i in range(0, tl.cdiv(last - first, tile)):
        rows = first + i * tile + tl.arange(0, tile)
        at = x + rows[:, None] * x_stride + columns[None, :] * column_stride
        part = tl.load(at, (rows < last)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(part))
    inverse = _inverse_scale(tl.max(amax, 0), e4m3_max, tiny)
    tl.store(scale + group * width + columns, 1.0 / inverse, inside)
    if matrices:
        data += group * width * height - first
    for i in range(0, tl.cdiv(last - first, tile)):
        rows = first + i * tile + tl.arange(0, tile)
        at = x + rows[:, None] * x_stride + columns[None, :] * column_stride
        part = tl.load(at, (rows < last)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        numbers = tl.trans((part * inverse[None, :]).to(tl.float8e4nv))
        out = data + columns.to(tl.int64)[:, None] * height + rows[None, :]
        tl.store(out, numbers, inside[:, None] & (rows < last)[None, :])


@triton.jit
def _quantize_sides(
    x,
    rows,
    columns,
    by_rows,
    by_columns,
    height,
    width: tl.constexpr,
    x_stride,
    column_stride,
    row_step,
    column_step,
    both: tl.constexpr,
    tile: tl.constexpr,
):
    row = (tl.program_id(1) * tile + tl.arange(0, tile)).to(tl.int64)
    column = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)
    inside = (row < height)[:, None] & (column < width)[None, :]
    at = x + row[:, None] * x_stride + column[None, :] * column_stride
    part = tl.load(at, inside, other=0.0).to(tl.float32)
    inverse = tl.load(by_rows + row * row_step, row < height, other=0.0)
    numbers = (part * inverse[:, None]).to(rows.dtype.element_ty)
    tl.store(rows + row[:, None] * width + column[None, :], numbers, inside)
    if both:
        inverse = tl.load(by_columns + column * column_step, column < width, other=0.0)
        numbers = tl.trans((part * inverse[None, :]).to(rows.dtype.element_ty))
        out = columns + column[:, None] * height + row[None, :]
        tl.store(out, numbers, tl.trans(inside))
