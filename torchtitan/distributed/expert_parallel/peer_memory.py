"""Memory of every rank that all ranks of a group read and write directly, and tensors in it."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from torchtitan.ops.peer_rows import PeerTensor

_ALIGNMENT = 256
"""Bytes; where a tensor begins."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensors by name: shape and dtype, the same on every rank."""


class PeerMemory(Protocol):
    """As many bytes of each rank."""

    rank: int
    buffers: Sequence[torch.Tensor]
    """(bytes,) uint8 of every rank, all of them usable here."""

    def barrier(self) -> None:
        """What any rank wrote before it is what every rank reads after it."""
        ...


class SymmetricMemory:
    """GPU memory over NVLink, through PyTorch's symmetric memory. Collective.

    A private module as of torch 2.11 and 2.13, the only place that uses it so. Its barrier is a
    kernel of the current stream: the host waits for nothing.
    """

    def __init__(self, group: dist.ProcessGroup, num_bytes: int):
        device = torch.device("cuda", torch.cuda.current_device())
        self.own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self.handle = symmetric_memory.rendezvous(self.own, group)
        self.rank = self.handle.rank
        self.buffers = [
            self.handle.get_buffer(rank, (num_bytes,), torch.uint8)
            for rank in range(self.handle.world_size)
        ]

    def barrier(self) -> None:
        self.handle.barrier()


def size_of(layout: Layout) -> int:
    """Bytes of all tensors of a layout, with the gaps between them."""
    return sum(_padded(shape, dtype) for shape, dtype in layout.values())


def lay_out(memory: PeerMemory, layout: Layout) -> dict[str, PeerTensor]:
    """The tensors of a layout, one after the other."""
    tensors, start = {}, 0
    for name, (shape, dtype) in layout.items():
        stop = start + math.prod(shape) * dtype.itemsize
        views = tuple(buffer[start:stop].view(dtype).view(shape) for buffer in memory.buffers)
        addresses = torch.tensor([view.data_ptr() for view in views], device=views[0].device)
        tensors[name] = PeerTensor(views, addresses)
        start += _padded(shape, dtype)
    return tensors


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
