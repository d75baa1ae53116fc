"""The loss's passes over logits as Triton kernels; what they compute is ops/cross_entropy.py's to say."""

import torch
import triton
import triton.language as tl

_BLOCK = 8192
_SCALED = 2048
_TILE = 128  # rows and columns of a tile that is written both ways, in lines of memory of 128 bytes


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As ops/cross_entropy.py's `cross_entropy_`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        width = logits.shape[1]
        _cross_entropy[(len(logits),)](logits, labels, losses, width, _BLOCK, num_warps=16)
    return losses


def scaled_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`cross_entropy_` whose gradient (T, V), times `scale` in a float8 dtype, is written beside logits.

    Also transposed, (V, T). Logits are read twice and stay what they are.
    """
    num_tokens, width = logits.shape
    losses, log_totals = torch.empty(2, num_tokens, dtype=torch.float32, device=logits.device)
    rows = torch.empty(num_tokens, width, dtype=dtype, device=logits.device)
    columns = torch.empty(width, num_tokens, dtype=dtype, device=logits.device)
    if num_tokens:
        _cross_entropy_losses[(num_tokens,)](logits, labels, losses, log_totals, width, _BLOCK, num_warps=16)
        grid = (triton.cdiv(width, _TILE), triton.cdiv(num_tokens, _TILE))
        tensors = (logits, labels, log_totals, rows, columns)
        _cross_entropy_gradient[grid](*tensors, num_tokens, width, scale, _TILE, num_warps=16)
    return losses, rows, columns


def scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (...), contiguous, times factor (), fp32, in dtype."""
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _SCALED),)
        _scaled[grid](x, factor, out, x.numel(), _SCALED)
    return out


@triton.jit
def _scaled(x, factor, out, size, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    numbers = tl.load(x + at, inside, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + at, numbers.to(out.dtype.element_ty), inside)


@triton.jit
def _cross_entropy(logits, labels, losses, width: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * width
    label = tl.load(labels + token)
    valid = label >= 0  # an ignored one is negative
    at_label = tl.load(row + tl.where(valid, label, 0)).to(tl.float32)  # read before it is overwritten
    log_total = _log_total(row, width, block)
    tl.store(losses + token, tl.where(valid, log_total - at_label, 0.0))
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        values = tl.load(row + columns, inside, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(values - log_total) - tl.where(columns == label, 1.0, 0.0)
        gradient = tl.where(valid, gradient, 0.0)
        tl.store(row + columns, gradient.to(logits.dtype.element_ty), inside)


@triton.jit
def _cross_entropy_losses(logits, labels, losses, log_totals, width: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * width
    label = tl.load(labels + token)
    valid = label >= 0
    at_label = tl.load(row + tl.where(valid, label, 0)).to(tl.float32)
    log_total = _log_total(row, width, block)
    tl.store(losses + token, tl.where(valid, log_total - at_label, 0.0))
    tl.store(log_totals + token, log_total)


@triton.jit
def _log_total(row, width: tl.constexpr, block: tl.constexpr):
    """Of a row, the logarithm of the sum of exponentials."""
    # Maximum and sum in one pass: each lane keeps its own, rescaled as it grows.
    maxima = tl.full([block], float("-inf"), tl.float32)
    sums = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        values = tl.load(row + columns, columns < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(maxima, values)
        # A lane that has seen nothing yet stays out: -inf minus -inf is no number.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(maxima - safe) + tl.exp(values - safe)
        maxima = higher
    maximum = tl.max(maxima)
    return maximum + tl.log(tl.sum(sums * tl.exp(maxima - maximum)))


@triton.jit
def _cross_entropy_gradient(
    logits,
    labels,
    log_totals,
    rows,
    columns,
    num_tokens,
    width: tl.constexpr,
    scale: tl.constexpr,
    tile: tl.constexpr,
):
    token = (tl.program_id(1) * tile + tl.arange(0, tile)).to(tl.int64)
    column = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)
    there = token < num_tokens
    inside = there[:, None] & (column < width)[None, :]
    label = tl.load(labels + token, there, other=-1)
    log_total = tl.load(log_totals + token, there, other=0.0)
    at = token[:, None] * width + column[None, :]
    values = tl.load(logits + at, inside, other=0.0).to(tl.float32)
    gradient = tl.exp(values - log_total[:, None]) - tl.where(column[None, :] == label[:, None], 1.0, 0.0)
    gradient = tl.where((label >= 0)[:, None], gradient, 0.0)
    numbers = (gradient * scale).to(rows.dtype.element_ty)
    tl.store(rows + at, numbers, inside)
    tl.store(columns + column[:, None] * num_tokens + token[None, :], tl.trans(numbers), tl.trans(inside))
