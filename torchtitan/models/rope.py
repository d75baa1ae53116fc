"""Rotary position embedding (arXiv 2104.09864) with Llama 3's frequency scaling.

B batch, L sequence, H heads, C head_dim. A head's channels are rotated in pairs (c, c + C/2), the
layout of Hugging Face checkpoints.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoPEScaling:
    """Llama 3.1's stretching of long wavelengths; the fields of `rope_scaling` in its config.json."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


def rope_frequencies(head_dim: int, theta: float, scaling: RoPEScaling | None) -> torch.Tensor:
    """Radians a position for each channel pair, float64, (C/2,)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    # Wavelengths shorter than the high-frequency bound stay, those longer than the low-frequency
    # bound are stretched by the factor, and in between the two are blended linearly in frequency.
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rope_table(
    head_dim: int, theta: float, scaling: RoPEScaling | None, length: int, device: torch.device
) -> torch.Tensor:
    """Cosines and sines of positions 0 to length - 1, fp32, (length, 2, C/2)."""
    frequencies = rope_frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=1).to(device, torch.float32)


def apply_rope(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, L, H, C) by rope (B or 1, L, 2, C/2); in fp32, returned in x's dtype."""
    cos, sin = rope.unsqueeze(-3).unbind(-2)  # (B or 1, L, 1, C/2)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)
