"""Triton kernels of the MoE layer's passes over memory; what each computes is its reference's to say.

Imported on first use on a GPU: PyTorch for CPUs comes without Triton. All arithmetic is in fp32.
"""

import torch
import triton
import triton.language as tl

_MAX_BLOCK = 2048


def sum_rows(y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As ops/rows.py's `sum_rows`."""
    num_tokens, top_k = rows.shape
    out = y.new_empty(num_tokens, y.shape[1])
    if num_tokens:
        block = _block(y.shape[1])
        _sum_rows[(num_tokens,)](y, rows, out, y.shape[1], y.stride(0), top_k, block)
    return out


def zero_rows_after(counts: torch.Tensor, x: torch.Tensor) -> None:
    """As ops/rows.py's `zero_rows_after`."""
    if len(x):
        rows = 64
        experts = triton.next_power_of_2(len(counts))
        grid = (triton.cdiv(len(x), rows),)
        _zero_rows[grid](x, counts, len(counts), len(x), x.shape[1], experts, rows, 256)


def swiglu(z: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
    """As ops/swiglu.py's `swiglu`."""
    out = z.new_empty(len(z), z.shape[1] // 2)
    if len(z):
        width = out.shape[1]
        _swiglu[(len(z),)](z, scores, out, width, scores is not None, _block(width))
    return out


def swiglu_backward(
    d_act: torch.Tensor, z: torch.Tensor, scores: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As ops/swiglu.py's `swiglu_backward`."""
    act, d_z = torch.empty_like(d_act), torch.empty_like(z)
    d_scores = None if scores is None else torch.empty_like(scores)
    if len(z):
        width, weighted = d_act.shape[1], scores is not None
        _swiglu_backward[(len(z),)](
            d_act, z, scores, act, d_z, d_scores, width, weighted, _block(width)
        )
    return act, d_z, d_scores


def _block(width: int) -> int:
    return min(_MAX_BLOCK, triton.next_power_of_2(width))


@triton.jit
def _sum_rows(y, rows, out, width, y_stride, top_k: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        total = tl.zeros([block], dtype=tl.float32)
        for k in range(top_k):
            row = tl.load(rows + token * top_k + k)
            total += tl.load(y + row * y_stride + columns, inside, other=0.0).to(tl.float32)
        tl.store(out + token * width + columns, total.to(out.dtype.element_ty), inside)


@triton.jit
def _zero_rows(
    x,
    counts,
    num_experts,
    num_rows,
    width,
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
def _swiglu(z, scores, out, width, weighted: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    score = tl.load(scores + row) if weighted else 1.0
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        gate = tl.load(z + row * 2 * width + columns, inside, other=0.0).to(tl.float32)
        up = tl.load(z + row * 2 * width + width + columns, inside, other=0.0).to(tl.float32)
        act = gate * tl.sigmoid(gate) * up * score
        tl.store(out + row * width + columns, act.to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(
    d_act, z, scores, act, d_z, d_scores, width, weighted: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    score = tl.load(scores + row) if weighted else 1.0
    d_score = tl.zeros([block], dtype=tl.float32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        gate = tl.load(z + row * 2 * width + columns, inside, other=0.0).to(tl.float32)
        up = tl.load(z + row * 2 * width + width + columns, inside, other=0.0).to(tl.float32)
        gradient = tl.load(d_act + row * width + columns, inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_score += gradient * silu * up
        tl.store(
            act + row * width + columns, (silu * up * score).to(act.dtype.element_ty), inside
        )
        gradient = gradient * score
        d_gate = gradient * up * (sigmoid + silu * (1 - sigmoid))
        at = d_z + row * 2 * width + columns
        tl.store(at, d_gate.to(d_z.dtype.element_ty), inside)
        tl.store(at + width, (gradient * silu).to(d_z.dtype.element_ty), inside)
    if weighted:
        tl.store(d_scores + row, tl.sum(d_score))
