"""The loss's pass over logits as a Triton kernel; what it computes is ops/cross_entropy.py's to say."""

import torch
import triton
import triton.language as tl

_BLOCK = 8192


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As ops/cross_entropy.py's `cross_entropy_`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        width = logits.shape[1]
        _cross_entropy[(len(logits),)](logits, labels, losses, width, _BLOCK, num_warps=16)
    return losses


@triton.jit
def _cross_entropy(logits, labels, losses, width: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * width
    label = tl.load(labels + token)
    valid = label >= 0  # an ignored one is negative
    at_label = tl.load(row + tl.where(valid, label, 0)).to(tl.float32)  # read before it is overwritten
    # Maximum and sum of exponentials in one pass: each lane keeps its own, rescaled as it grows.
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
    total = tl.sum(sums * tl.exp(maxima - maximum))
    log_total = maximum + tl.log(total)
    tl.store(losses + token, tl.where(valid, log_total - at_label, 0.0))
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        values = tl.load(row + columns, inside, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(values - log_total) - tl.where(columns == label, 1.0, 0.0)
        gradient = tl.where(valid, gradient, 0.0)
        tl.store(row + columns, gradient.to(logits.dtype.element_ty), inside)
