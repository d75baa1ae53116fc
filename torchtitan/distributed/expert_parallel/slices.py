"""Which of T tokens that tensor-parallel ranks share does each dispatch? Slices need not be equal."""

import torch
import torch.nn.functional as F


def own_slice(num_tokens: int, num_slices: int, index: int) -> slice:
    """The first slices are equal, the last ones hold what is left, maybe nothing."""
    size = -(-num_tokens // num_slices)
    return slice(min(index * size, num_tokens), min((index + 1) * size, num_tokens))


def in_place(out: torch.Tensor, own: slice, num_tokens: int) -> torch.Tensor:
    """The slice's rows where they belong among zeros: (T, D), which all ranks' add up to the whole."""
    if len(out) == num_tokens:
        return out
    return F.pad(out, (0, 0, own.start, num_tokens - own.stop))
