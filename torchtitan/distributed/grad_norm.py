"""The global gradient norm: one routine for plain tensors and DTensors on any mesh."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import get_total_norm


def global_grad_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.Tensor:
    """L2 norm of the whole model's gradient: fp32 scalar on `device`, the same bits on every rank.

    Each rank adds the squares of what it holds, divided by how many ranks hold the same, and one
    all-reduce over the world sums them. A rank without any gradient takes part with zero.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    by_copies: dict[int, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            local, shards = _local(parameter.grad)
            by_copies[world_size // shards].append(local)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for copies, grads in by_copies.items():
        total += get_total_norm(grads).to(device, torch.float32) ** 2 / copies
    if world_size > 1:
        dist.all_reduce(total)
    return total.sqrt()


def _local(grad: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's part of a gradient, and into how many different parts the gradient is split."""
    if not isinstance(grad, DTensor):
        return grad, 1
    sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
    shards = 1
    for placement, size in sizes:
        assert not placement.is_partial(), f"gradient is still partial: {grad.placements}"
        shards *= size if isinstance(placement, Shard) else 1
    return grad.to_local(), shards
