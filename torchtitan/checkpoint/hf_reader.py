"""Reads Hugging Face files as a distributed checkpoint: any layout's parts, and nothing else.

Each tensor of theirs is a chunk of one of ours. PyTorch's planner then finds what a rank needs of
which chunk, whatever the placements are; no rank has to talk to another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from torchtitan.checkpoint.hf_files import DTYPES, BlockScales, TensorFiles
from torchtitan.checkpoint.hf_pieces import Piece, Source
from torchtitan.config.faults import ConfigError, Fault


class PieceReader(FileSystemReader):
    """Reads our tensors from pieces, dequantized by `scales`; `copies` are names of pieces' twins."""

    def __init__(
        self,
        folder: Path,
        pieces: Sequence[Piece],
        files: TensorFiles,
        scales: BlockScales | None,
        copies: Mapping[str, str],
    ):
        super().__init__(folder)
        self.files = files
        self.scales = scales
        self.copies = copies
        self.metadata = _metadata(pieces, files)

    def read_metadata(self) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            piece = self.storage_data[item.storage_index]
            part = piece.read(self._source(piece.theirs), item.storage_offsets, item.lengths)
            if piece.theirs in self.copies:
                self._compare(piece, item, part)
            planner.resolve_tensor(item).copy_(part)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _source(self, name: str) -> Source:
        return self.scales.source(self.files, name) if self.scales else self.files.source(name)

    def _compare(self, piece: Piece, item: ReadItem, part: torch.Tensor) -> None:
        copy = self.copies[piece.theirs]
        if not torch.equal(
            part, piece.read(self._source(copy), item.storage_offsets, item.lengths)
        ):
            reason = (
                f"{piece.theirs} and {copy} differ, but config.json says that they are one weight "
                "(tie_word_embeddings)."
            )
            raise ConfigError([Fault(str(self.path), reason)])


def _metadata(pieces: Sequence[Piece], files: TensorFiles) -> Metadata:
    """Our tensors and the chunks they lie in; a tensor's dtype is that of its first chunk."""
    dtypes = {p.ours: DTYPES[files.dtypes[p.theirs]] for p in reversed(pieces)}
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for p in pieces:
        chunk = ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes))
        chunks.setdefault(p.ours, []).append(chunk)
    tensors = {
        name: TensorStorageMetadata(TensorProperties(dtypes[name]), _whole(found), found)
        for name, found in chunks.items()
    }
    return Metadata(tensors, storage_data={MetadataIndex(p.ours, p.offsets): p for p in pieces})


def _whole(chunks: Sequence[ChunkStorageMetadata]) -> torch.Size:
    ends = [[o + s for o, s in zip(c.offsets, c.sizes)] for c in chunks]
    return torch.Size(map(max, zip(*ends)))


def read_into(state: dict[str, torch.Tensor], reader: FileSystemReader) -> None:
    """Fill tensors of any layout, in place. Not collective."""
    _read(reader, DefaultLoadPlanner(flatten_state_dict=False), state)


@dataclass(frozen=True)
class Box:
    """Where a part of a tensor begins, and how far it reaches."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def joined(self, other: "Box") -> "Box":
        """The smallest box that both are in."""
        offsets = tuple(map(min, self.offsets, other.offsets))
        ends = (
            max(a + m, b + n)
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes)
        )
        return Box(offsets, tuple(end - first for end, first in zip(ends, offsets)))

    def cut(
        self, part: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]
    ) -> torch.Tensor:
        """A smaller box out of this one's part of a tensor; offsets are those in the whole."""
        starts = [offset - first for offset, first in zip(offsets, self.offsets)]
        return part[tuple(slice(start, start + size) for start, size in zip(starts, sizes))]


def read_boxes(
    boxes: Mapping[str, Box], reader: FileSystemReader, dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Parts of tensors by their names, on the CPU."""
    parts = {name: torch.empty(box.sizes, dtype=dtypes[name]) for name, box in boxes.items()}
    _read(reader, _BoxPlanner(boxes), parts)
    return parts


def _read(
    reader: FileSystemReader, planner: DefaultLoadPlanner, state: dict[str, torch.Tensor]
) -> None:
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, is_coordinator=False)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.create_local_plan(), planner).wait()


class _BoxPlanner(DefaultLoadPlanner):
    """Plans to read parts; the default planner takes a plain tensor for a whole one."""

    def __init__(self, boxes: Mapping[str, Box]):
        super().__init__(flatten_state_dict=False)
        self.boxes = boxes

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, box in self.boxes.items():
            chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            saved = self.metadata.state_dict_metadata[name]
            items += create_read_items_for_chunk_list(name, saved, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn]
