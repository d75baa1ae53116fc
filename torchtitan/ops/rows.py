"""Rows taken by index, and sums of them, as operators. T tokens, K rows a token, R rows, D width."""

import torch
import torch.nn.functional as F

from torchtitan.ops.wide import wide_dtype


@torch.library.custom_op("torchtitan::sum_rows", mutates_args=())
def sum_rows(y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over k of y[rows[t, k]]: y (R, D), rows (T, K) int32 or int64 -> (T, D) in y's dtype.

    A row below 0 adds nothing. Added in fp32 (fp64 for fp64) in the order of k, rounded once. An
    operator of its own: inductor of torch 2.11 fuses the sum into a norm's backward that reads what
    it has not written yet.
    """
    if y.is_cuda and y.dtype != torch.float64:
        from torchtitan.ops import triton_kernels  # PyTorch for CPUs comes without Triton

        return triton_kernels.sum_rows(y, rows)
    total = torch.zeros(len(rows), y.shape[1], dtype=wide_dtype(y), device=y.device)
    if (rows < 0).any():
        y, rows = F.pad(y, (0, 0, 0, 1)), rows.masked_fill(rows < 0, len(y))
    for k in range(rows.shape[1]):
        total += y.index_select(0, rows[:, k])
    return total.to(y.dtype) if total.dtype != y.dtype else total


@sum_rows.register_fake
def _(y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return y.new_empty(len(rows), y.shape[1])


def invert_rows(
    rows: torch.Tensor, scores: torch.Tensor | None, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From rows (T, K) int32, which differ, and scores (T, K) or None: each row's token and score, (R,).

    A row that `rows` does not name has token -1 and score 0. R is num_rows.
    """
    full = num_rows == rows.numel()
    tokens = rows.new_empty(num_rows) if full else rows.new_full((num_rows,), -1)
    by_row = scores
    if scores is not None:
        by_row = scores.new_empty(num_rows) if full else scores.new_zeros(num_rows)
    if rows.is_cuda:
        from torchtitan.ops import triton_kernels  # PyTorch for CPUs comes without Triton

        triton_kernels.invert_rows(rows, scores, tokens, by_row)
        return tokens, by_row
    tokens[rows] = torch.arange(len(rows), dtype=rows.dtype).unsqueeze(1)
    if scores is not None:
        by_row[rows] = scores
    return tokens, by_row


@torch.library.custom_op("torchtitan::take_rows", mutates_args=())
def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """out[r] = x[index[r]], and zeros where index[r] is -1: x (T, D), index (R,) of integers -> (R, D)."""
    if not len(x):
        return x.new_zeros(len(index), x.shape[1])
    if x.is_cuda:
        from torchtitan.ops import triton_kernels  # PyTorch for CPUs comes without Triton

        return triton_kernels.take_rows(x, index)
    return x.index_select(0, index.clamp(min=0)).masked_fill_((index < 0).unsqueeze(1), 0)


@take_rows.register_fake
def _(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(index), x.shape[1])
