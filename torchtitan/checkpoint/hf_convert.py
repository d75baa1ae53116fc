"""Checkpoints from Hugging Face folders and back, with no model in memory: piece by piece."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from tqdm import tqdm

from torchtitan.checkpoint import storage
from torchtitan.checkpoint.hf import is_quantized, open_folder
from torchtitan.checkpoint.hf_export import Export, write
from torchtitan.checkpoint.hf_folder import published, refuse_files
from torchtitan.checkpoint.hf_reader import Box, PieceReader, read_boxes
from torchtitan.checkpoint.storage import MODEL
from torchtitan.config.faults import ConfigError, Fault

MAX_CHUNK_BYTES = 10**9
"""Of a tensor, read and written at a time, as far as whole rows go."""


def from_hf(folder: Path, output: Path, config: Any, name: str, dtype: torch.dtype | None) -> None:
    """Write a checkpoint of step 0 with a folder's weights, for checkpoint.initial_load_path.

    `dtype` is that of the parameters, by default the files' own; quantized ones become bfloat16.
    Raises ConfigError where the folder does not hold just this model, or `output` has files.
    """
    reader = open_folder(folder, config, name, is_quantized(folder))
    with torch.device("meta"):
        model = config.build()
    parameters = dict(model.named_parameters())
    held = reader.metadata.state_dict_metadata
    tensors = {}
    for ours, tensor in model.state_dict().items():
        read_as = held[ours].properties.dtype if ours in held else tensor.dtype
        tensors[ours] = tensor.to(dtype if dtype and ours in parameters else read_as)
    refuse_files(output)
    temporary = output.with_name(f"{output.name}.tmp")
    storage.new_folder(temporary)
    # A file a chunk: the writer holds on to all that it has written to a file until that is whole.
    writer = FileSystemWriter(temporary, single_file_per_rank=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        planner = _ChunkPlanner(reader, tensors)
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    progress = {"step": 0, "model_only": True}
    files = {path.name: storage.fingerprint(path) for path in sorted(temporary.iterdir())}
    storage.publish(temporary, {"progress": progress, "origin": {"folder": str(folder)}, "files": files})


def to_hf(
    checkpoint: Path,
    output: Path,
    config: Any,
    name: str,
    dtype: torch.dtype | None,
    assets: Path | None,
) -> None:
    """Write a folder with a checkpoint's weights, be it complete or of weights alone.

    `dtype` is that of the parameters, by default the checkpoint's. Tokenizer files are copied from
    `assets`. Raises ConfigError where the checkpoint is not of this model, or `output` has files.
    """
    if not (checkpoint / ".metadata").exists():
        raise ConfigError([Fault(str(checkpoint), "is no checkpoint (a folder like step-1000).")])
    if storage.has_manifest(checkpoint):
        if what := storage.damage(checkpoint) or ", ".join(storage.altered_files(checkpoint)):
            raise ConfigError([Fault(str(checkpoint), f"is damaged: {what}.")])
    export = Export.of(config, name)
    with published(output) as temporary:
        write(export, checkpoint, temporary, dtype, assets, progress_bar=True)


class _ChunkPlanner(DefaultSavePlanner):
    """Plans to save tensors that are nowhere yet: each chunk is read when it is written."""

    def __init__(self, reader: PieceReader, tensors: Mapping[str, torch.Tensor]):
        super().__init__(flatten_state_dict=False)
        self.reader = reader
        self.tensors = tensors
        total = sum(tensor.nbytes for tensor in tensors.values())
        self.bar = tqdm(total=total, unit="B", unit_scale=True)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([c for name, t in self.tensors.items() for c in _chunks(name, t)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        chunk = write_item.tensor_data.chunk
        name = write_item.index.fqn.removeprefix(MODEL)
        dtype = write_item.tensor_data.properties.dtype
        if name in self.reader.metadata.state_dict_metadata:
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            tensor = read_boxes({name: box}, self.reader, {name: dtype})[name]
        else:
            tensor = torch.zeros(chunk.sizes, dtype=dtype)
        self.bar.update(tensor.nbytes)
        return tensor


def _chunks(name: str, tensor: torch.Tensor) -> Iterator[WriteItem]:
    """A tensor in parts of whole rows."""
    num_rows = max(1, MAX_CHUNK_BYTES // max(1, tensor[0].nbytes))
    for start in range(0, len(tensor), num_rows):
        offsets = torch.Size([start, *[0] * (tensor.dim() - 1)])
        sizes = torch.Size([min(num_rows, len(tensor) - start), *tensor.shape[1:]])
        yield WriteItem(
            MetadataIndex(MODEL + name, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(offsets, sizes), TensorProperties(tensor.dtype), tensor.shape
            ),
        )
