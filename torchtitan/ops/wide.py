"""The precision that sums are made in, whatever their terms have: fp32, of fp64 fp64."""

import torch


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def widened(x: torch.Tensor) -> torch.Tensor:
    return x.to(wide_dtype(x))
