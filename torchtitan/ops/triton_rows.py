"""Triton kernels that move rows by index; what each computes is ops/rows.py's to say.

Imported on first use on a GPU: PyTorch for CPUs comes without Triton.
"""

import torch
import triton
import triton.language as tl

_MAX_BLOCK = 2048
_PARTS_OF_RUN = 4
"""Programs that share a run of rows: experts' loads differ."""


def sum_rows(y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As ops/rows.py's `sum_rows`."""
    num_tokens, top_k = rows.shape
    out = y.new_empty(num_tokens, y.shape[1])
    if num_tokens:
        block = block_of(y.shape[1])
        _sum_rows[(num_tokens,)](y, rows, out, y.shape[1], *y.stride(), top_k, block)
    return out


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """As ops/rows.py's `take_rows`."""
    out = x.new_empty(len(index), x.shape[1])
    if len(index):
        _take_rows[(len(index),)](x, index, out, x.shape[1], *x.stride(), block_of(x.shape[1]))
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


def regroup(counts: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> None:
    """As ops/rows.py's `regroup`, into order and inverse."""
    if len(order):
        runs = triton.next_power_of_2(counts.numel())
        grid = counts.numel(), _PARTS_OF_RUN
        _regroup[grid](counts.contiguous(), order, inverse, *counts.shape, runs, _PARTS_OF_RUN, 1024)


def block_of(width: int) -> int:
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
def _regroup(
    counts,
    order,
    inverse,
    num_outer,
    num_inner,
    runs: tl.constexpr,
    parts: tl.constexpr,
    block: tl.constexpr,
):
    run = tl.program_id(0)
    index = tl.arange(0, runs)
    sizes = tl.load(counts + index, index < num_outer * num_inner, other=0)
    place = index % num_inner * num_outer + index // num_inner
    own_place = run % num_inner * num_outer + run // num_inner
    first = tl.sum(tl.where(index < run, sizes, 0))
    moved = tl.sum(tl.where(place < own_place, sizes, 0))
    size = tl.load(counts + run)
    for start in range(tl.program_id(1) * block, size, parts * block):
        row = start + tl.arange(0, block)
        inside = row < size
        tl.store(order + moved + row, (first + row).to(tl.int32), inside)
        tl.store(inverse + first + row, (moved + row).to(tl.int32), inside)
