"""What of a tensor is on this rank? Of a plain tensor all, of a DTensor its part."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

T = TypeVar("T")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor; no copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local_part(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The tensor of which ranks hold `part` where they hold their parts of this one; no copy."""
    if not isinstance(tensor, DTensor):
        return part
    layout = (tensor.device_mesh, tensor.placements)
    # Said, for parts need not be equally large.
    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(part, *layout, run_check=False, **shape)


def place_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Which part of a tensor this rank holds: equal where ranks hold the same."""
    if not isinstance(tensor, DTensor):
        return ()
    coordinates = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return tuple(index for index, kind in coordinates if not isinstance(kind, Replicate))


def by_mesh(items: Iterable[T], key: Callable[[T], torch.Tensor]) -> list[list[T]]:
    """`items` divided by the mesh of the tensor that `key` gives; plain tensors are a part too."""
    parts: dict[DeviceMesh | None, list[T]] = {}
    for item in items:
        tensor = key(item)
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        parts.setdefault(mesh, []).append(item)
    return list(parts.values())
