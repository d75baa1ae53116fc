"""Rotary position embedding (arXiv 2104.09864), and two ways to stretch it to longer sequences.

B batch, L sequence, H heads, C rotated channels of a head. Channels are rotated in pairs
(c, c + C/2), as most Hugging Face checkpoints have them, or in neighbours (c, c + 1).
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

    def kept(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        """How much of each frequency stays, 1 for short wavelengths to 0 for long ones, (C/2,)."""
        turns = self.original_max_seq_len * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return kept.clamp(0.0, 1.0)

    @property
    def magnitude(self) -> float:
        """Factor on rotated channels."""
        return 1.0


@dataclass(frozen=True)
class YaRNScaling:
    """YaRN (arXiv 2309.00071), with DeepSeek's names for its fields."""

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    """Channels that turn more often than this over the original length stay as they are."""
    beta_slow: float = 1.0
    """Those that turn less often are stretched by the whole factor."""
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    """The ramp between the two begins and ends at whole channels; gpt-oss's does not."""

    def kept(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        """How much of each frequency stays, 1 for short wavelengths to 0 for long ones, (C/2,)."""
        pairs = len(frequencies)
        # The ramp is linear in the channel's index.
        first = self._pair_that_turns(self.beta_fast, pairs, theta)
        last = self._pair_that_turns(self.beta_slow, pairs, theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        index = torch.arange(pairs, dtype=torch.float64, device=frequencies.device)
        return 1.0 - ((index - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)

    def _pair_that_turns(self, times: float, pairs: int, theta: float) -> float:
        """Index of the pair that turns so often over the original length; not a whole number."""
        radians_a_position = 2 * math.pi * times / self.original_max_seq_len
        return -pairs * math.log(radians_a_position) / math.log(theta)

    @property
    def magnitude(self) -> float:
        """Factor on rotated channels."""
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """Factor on attention's scores: longer contexts need a sharper softmax."""
        return self._magnitude(self.mscale_all_dim) ** 2

    def _magnitude(self, weight: float) -> float:
        return 1.0 + 0.1 * weight * math.log(self.factor) if self.factor > 1 else 1.0


Scaling = RoPEScaling | YaRNScaling


def rope_frequencies(channels: int, theta: float, scaling: Scaling | None) -> torch.Tensor:
    """Radians a position for each channel pair, float64, (C/2,)."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device="cpu") / channels
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    # Short wavelengths stay, long ones are stretched by the factor, and in between the two are
    # blended linearly in frequency.
    kept = scaling.kept(frequencies, theta)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rope_table(
    channels: int, theta: float, scaling: Scaling | None, length: int, device: torch.device
) -> torch.Tensor:
    """Cosines and sines of positions 0 to length - 1, fp32, (length, 2, C/2)."""
    frequencies = rope_frequencies(channels, theta, scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
    table = torch.stack([angles.cos(), angles.sin()], dim=1)
    magnitude = scaling.magnitude if scaling is not None else 1.0
    return (table * magnitude).to(device, torch.float32)


def apply_rope(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, L, H, C) by rope (B or 1, L, 2, C/2); in fp32, returned in x's dtype."""
    cos, sin = rope.unsqueeze(-3).unbind(-2)  # (B or 1, L, 1, C/2)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def apply_rope_to_neighbours(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """As `apply_rope`, for pairs (c, c + 1)."""
    cos, sin = rope.unsqueeze(-3).unbind(-2)
    pairs = x.float().unflatten(-1, (-1, 2))
    # One formula for both channels: halves to join or to take apart cost compiled code half its speed here.
    signed = torch.stack([-sin, sin], dim=-1)
    return (pairs * cos.unsqueeze(-1) + pairs.flip(-1) * signed).flatten(-2).to(x.dtype)
