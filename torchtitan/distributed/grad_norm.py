"""The global gradient norm and clipping: for plain tensors and DTensors on any meshes."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def global_grad_norm(
    parameters: Iterable[nn.Parameter], loss: torch.Tensor, stage_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """L2 norm of the whole model's gradient, and the sum of all ranks' shares of the loss.

    fp64 scalars on the device of `loss`, the same bits on every rank. Each rank adds the squares of
    what it holds, divided by how many of the `stage_size` ranks of its pipeline stage hold the same,
    and one all-reduce over the world sums them together with the loss. A rank without any gradient
    takes part with zero.
    """
    by_copies: dict[int, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            local, shards = _local(parameter.grad)
            by_copies[stage_size // shards].append(local)
    squares = torch.zeros((), dtype=torch.float64, device=loss.device)
    for copies, grads in by_copies.items():
        squares += torch.stack([_norm(grad) for grad in grads]).to(squares).square().sum() / copies
    totals = torch.stack([squares, loss.to(squares)])
    if dist.is_initialized():
        dist.all_reduce(totals)
    return totals[0].sqrt(), totals[1]


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of this norm (a scalar tensor) are multiplied by, so that it does not exceed max_norm."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _norm(grad: torch.Tensor) -> torch.Tensor:
    # CPUs add fp32 numbers nearly one by one: a million of them are off by 1e-5. By rows they are not.
    if grad.device.type == "cpu":
        grad = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32)
        return torch.linalg.vector_norm(grad, dtype=torch.float64)
    return torch.linalg.vector_norm(grad, dtype=torch.float32)


def _local(grad: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's part of a gradient, and into how many different parts the gradient is split."""
    if not isinstance(grad, DTensor):
        return grad, 1
    sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
    shards = 1
    for placement, size in sizes:
        assert not placement.is_partial(), f"gradient is still partial: {grad.placements}"
        shards *= 1 if placement.is_replicate() else size
    return grad.to_local(), shards
