"""Has a function work on whole matrices where ranks hold parts of them, and shares out the work.

Each of the ranks that matrices are split over gets some of them whole, and its parts of the results
back. n matrices, r rows, c columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Cut:
    """How one mesh axis splits the matrices of a parameter."""

    group: Any
    """The process group of the axis."""
    rank: int
    size: int
    """Ranks of the axis."""
    dim: int
    """What is split: 1 the rows, 2 the columns."""
    length: int
    """How many of them there were before."""


def cuts_of(tensor: torch.Tensor) -> list[Cut]:
    """The axes that split the matrices of a tensor (..., r, c), the last one that did so first.

    Axes that split its other dimensions, as by expert, leave matrices whole and are none of them.
    """
    if not isinstance(tensor, DTensor):
        return []
    mesh, shape = tensor.device_mesh, list(tensor.shape)
    cuts: list[Cut] = []
    # FSDP's axis comes before the tensor-parallel one, and splits what that one has left.
    for axis in reversed(range(mesh.ndim)):
        dim = getattr(tensor.placements[axis], "dim", None)  # of Shard, and FSDP's strided one
        size, rank = mesh.size(axis), mesh.get_local_rank(axis)
        if dim is None or size == 1:
            continue
        if (of_matrix := dim - tensor.ndim + 3) > 0:
            cuts.insert(0, Cut(mesh.get_group(axis), rank, size, of_matrix, shape[dim]))
        shape[dim] = _chunks(shape[dim], size)[rank]
    local = tensor.to_local().shape
    assert tuple(shape) == local, f"a part {tuple(local)} of {tuple(tensor.shape)} is not {shape}"
    return cuts


def on_whole_matrices(
    function: Callable[[torch.Tensor], torch.Tensor], parts: torch.Tensor, cuts: Sequence[Cut]
) -> torch.Tensor:
    """The parts (n, r', c') of the matrices that `function` makes of whole ones (n', r, c).

    Collective: all ranks of the cuts' groups have parts of the same n matrices.
    """
    if not cuts:
        return function(parts)
    last, *others = cuts
    whole = on_whole_matrices(function, _make_whole(parts, last), others)
    return _take_apart(whole, last, len(parts))


def _make_whole(parts: torch.Tensor, cut: Cut) -> torch.Tensor:
    """This rank's share of the n matrices, their parts put together."""
    parts = parts.transpose(1, cut.dim)  # the dim that is split comes first
    rows, shares = _chunks(cut.length, cut.size), _chunks(len(parts), cut.size)
    mine, width = shares[cut.rank], parts.shape[2]
    sizes = [mine * num_rows * width for num_rows in rows]
    received = parts.new_empty(sum(sizes))
    sent_sizes = [share * rows[cut.rank] * width for share in shares]
    dist.all_to_all_single(received, parts.flatten(), sizes, sent_sizes, group=cut.group)
    pieces = zip(received.split(sizes), rows, strict=True)
    whole = torch.cat([piece.view(mine, num_rows, width) for piece, num_rows in pieces], 1)
    return whole.transpose(1, cut.dim)


def _take_apart(whole: torch.Tensor, cut: Cut, num_matrices: int) -> torch.Tensor:
    """This rank's parts of all n matrices: the way back."""
    whole = whole.transpose(1, cut.dim)
    rows, shares = _chunks(cut.length, cut.size), _chunks(num_matrices, cut.size)
    width = whole.shape[2]
    sizes = [share * rows[cut.rank] * width for share in shares]
    received = whole.new_empty(sum(sizes))
    pieces = [piece.flatten() for piece in whole.split(rows, 1)]
    sent_sizes = [piece.numel() for piece in pieces]
    dist.all_to_all_single(received, torch.cat(pieces), sizes, sent_sizes, group=cut.group)
    return received.view(num_matrices, rows[cut.rank], width).transpose(1, cut.dim)


def _chunks(length: int, num_parts: int) -> list[int]:
    """Lengths of the parts that DTensor makes: equal ones, and the last ones shorter or empty."""
    most = -(-length // num_parts)
    return [max(0, min(most, length - part * most)) for part in range(num_parts)]
