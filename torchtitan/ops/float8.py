"""Numbers of 8 bits with one scale for all that a product adds up: how float8 products read them.

They are e4m3 but where a dtype is given. R rows in G groups, K and N widths, C columns. A scale is a
power of two, so that float8 numbers times their scale are exact in bfloat16, and are found again where
such numbers are quantized once more. It is defined for all-zero numbers too; NaN and infinity stay visible.
"""

from typing import NamedTuple

import torch

E4M3_MAX = 448.0
TINY = 1e-30
"""The least maximum that scales are made for: what is smaller becomes zero, or nearly."""

_EXPONENT_BITS = 0x7F800000  # of fp32: without the others a number is rounded down to a power of two


class Quantized(NamedTuple):
    """data * scale are the numbers."""

    data: torch.Tensor
    """float8"""
    scale: torch.Tensor
    """fp32; of `data`'s shape with the dim that products add up of size 1, or both."""


def quantize(x: torch.Tensor, dim: int) -> Quantized:
    """x of any shape, with one scale for all numbers along `dim`."""
    inverse = inverse_scale(x.abs().amax(dim, keepdim=True))
    return Quantized(_cast(x, inverse), inverse.reciprocal())


def dequantize(x: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The numbers; exact in bfloat16 and wider."""
    return x.data.to(dtype) * x.scale.to(dtype)


@torch.library.custom_op("torchtitan::quantize_rows", mutates_args=())
def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, K), one scale a row: `Quantized`'s data (R, K), row-major, and scale (R, 1)."""
    if has_float8(x.device):
        from torchtitan.ops import float8_triton  # PyTorch for CPUs comes without Triton

        return float8_triton.quantize_rows(x)
    if not x.numel():
        return torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_ones(len(x), 1, dtype=torch.float32)
    data, scale = quantize(x, 1)
    return data.contiguous(), scale


@quantize_rows.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)


def quantize_sides(
    x: torch.Tensor, by_rows: torch.Tensor, by_columns: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (R, C) times an inverse scale, (R, 1) or (1, 1): (R, C); times another, (1, C) or (1, 1): (C, R).

    Both row-major, in the float8 `dtype`; the second only where `by_columns` is given.
    """
    if has_float8_numbers(x.device):
        from torchtitan.ops import float8_triton  # PyTorch for CPUs comes without Triton

        return float8_triton.quantize_sides(x, by_rows, by_columns, dtype)
    rows = _cast(x, by_rows, dtype).contiguous()
    return rows, None if by_columns is None else _cast(x, by_columns, dtype).t().contiguous()


def quantize_group_columns(x: torch.Tensor, counts: torch.Tensor) -> Quantized:
    """x (R, N), one scale a column of each group's rows: data (R, N), scale (G, N).

    Rows after the sum of counts (G,) int64 take no part; what they become is undefined.
    """
    groups = _group_of_rows(len(x), counts)
    amax = x.new_zeros(len(counts) + 1, x.shape[1])
    amax.scatter_reduce_(0, groups.unsqueeze(1).expand_as(x), x.abs(), "amax")
    inverse = inverse_scale(amax)
    return Quantized(_cast(x, inverse[groups]), inverse[:-1].reciprocal())


def dequantize_group_columns(
    x: Quantized, counts: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The numbers of `quantize_group_columns`, (R, N)."""
    groups = _group_of_rows(len(x.data), counts).clamp(max=len(counts) - 1)
    return dequantize(Quantized(x.data, x.scale[groups]), dtype)


def has_float8_numbers(device: torch.device) -> bool:
    """Whether Triton has float8 numbers on the device: from Ada on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def has_float8(device: torch.device) -> bool:
    """Whether the device has float8 products of groups: as of torch 2.13 from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def inverse_scale(amax: torch.Tensor) -> torch.Tensor:
    """The largest power of two that brings no number of this maximum beyond E4M3_MAX, fp32."""
    ratio = E4M3_MAX / amax.float().clamp(min=TINY)
    return (ratio.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def _cast(
    x: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> torch.Tensor:
    return (x.float() * inverse).to(dtype)  # at most its largest number: nothing is cut off


def _group_of_rows(num_rows: int, counts: torch.Tensor) -> torch.Tensor:
    """(R,) int64: each row's group, and G after the last."""
    return torch.searchsorted(counts.cumsum(0), torch.arange(num_rows, device=counts.device), right=True)
