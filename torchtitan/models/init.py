"""Initial weights that are the same on every mesh: each parameter is drawn from a seed and its name.

A parameter's values depend only on (seed, fully qualified name), never on rank, mesh or on what was
drawn before it, so any layout starts from the same model without a seed checkpoint.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Normal:
    """Gaussian with mean 0; cut off at `cutoff` standard deviations where that is set."""

    std: float
    cutoff: float | None = None


@dataclass(frozen=True)
class Constant:
    value: float


@dataclass(frozen=True)
class PerExpert:
    """Each index of the first dimension is a tensor of its own: ranks draw only what they own."""

    each: Normal | Constant


Init = Normal | Constant | PerExpert


def parameter_inits(model: nn.Module) -> dict[str, Init]:
    """Map every parameter's name to how it is drawn, as each module's `inits` declares for its own.

    A parameter that several modules share appears once, under its owner's name (the first in
    module order). Raises AssertionError for a parameter nobody declares.
    """
    inits = dict(_declared(model))
    missing = [name for name, _ in model.named_parameters() if name not in inits]
    assert not missing, f"no module declares how to draw {missing}"
    return inits


def _declared(model: nn.Module) -> Iterator[tuple[str, Init]]:
    for prefix, module in model.named_modules():
        for name, init in getattr(module, "inits", {}).items():
            yield f"{prefix}.{name}" if prefix else name, init


def draw(
    name: str, shape: torch.Size, rows: torch.Tensor, init: Init, seed: int, device: torch.device
) -> torch.Tensor:
    """The given rows (indices of the first dimension) of one parameter's logical tensor, fp32.

    `device` is where they are drawn: generators of different devices give different numbers.
    """
    if isinstance(init, PerExpert):
        each = [_draw_whole(f"{name}.{i}", shape[1:], init.each, seed, device) for i in rows.tolist()]
        return torch.stack(each) if each else torch.empty(0, *shape[1:], device=device)
    whole = _draw_whole(name, shape, init, seed, device)
    return whole if len(rows) == shape[0] else whole.index_select(0, rows.to(device))


def _draw_whole(
    name: str, shape: torch.Size, init: Normal | Constant, seed: int, device: torch.device
) -> torch.Tensor:
    values = torch.empty(shape, dtype=torch.float32, device=device)
    if isinstance(init, Constant):
        return values.fill_(init.value)
    generator = torch.Generator(device=device).manual_seed(_seed_of(name, seed))
    if init.cutoff is None:
        return values.normal_(0.0, init.std, generator=generator)
    bound = init.cutoff * init.std
    return nn.init.trunc_normal_(values, 0.0, init.std, -bound, bound, generator=generator)


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds below 2**63
