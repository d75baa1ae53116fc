"""The best K of a few values, as an operator: PyTorch's own `topk` on GPUs is made for many. T rows."""

import torch


@torch.library.custom_op("torchtitan::top_k", mutates_args=())
def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of each row's k largest values, largest first: (T, E) -> (T, k) int64.

    Of equal ones the same come first every time; on GPUs the first ones.
    """
    if scores.is_cuda and scores.dtype != torch.float64:
        from torchtitan.ops import triton_kernels  # PyTorch for CPUs comes without Triton

        return triton_kernels.top_k(scores.contiguous(), k)
    return scores.topk(k, dim=-1).indices


@top_k.register_fake
def _(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.new_empty(len(scores), k, dtype=torch.int64)
