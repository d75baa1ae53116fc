"""Writes models as Hugging Face folders, from any layout.

A model is first saved as a distributed checkpoint; then each rank writes some of the files, and reads
what they hold. So no rank needs memory for more than one file.
"""

import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from tqdm import tqdm

from torchtitan.checkpoint.hf_folder import (
    num_ranks,
    published,
    rank,
    write_config,
    write_json,
)
from torchtitan.checkpoint.hf_names import INDEX, SINGLE
from torchtitan.checkpoint.hf_pieces import Piece, is_statistic, mismatches, only_ours, pieces
from torchtitan.checkpoint.hf_reader import Box, read_boxes
from torchtitan.checkpoint.storage import MODEL
from torchtitan.checkpoint.writer import on_all_ranks
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.models.hf_format import encode_config
from torchtitan.models.registry import hf_formats
from torchtitan.weight_map import OnlyOurs, WeightMap

MAX_FILE_BYTES = 5 * 10**9
"""Of tensors in one file; a larger tensor has a file of its own."""


@dataclass(frozen=True)
class Export:
    """A model as a Hugging Face folder has it."""

    config: Mapping[str, Any]
    """config.json, but for the dtype and the ids of special tokens."""
    pieces: Sequence[Piece]
    weights: WeightMap
    shapes: Mapping[str, Sequence[int]]
    """Of all tensors of ours."""
    left_out: Mapping[str, OnlyOurs]
    """Those of them that no file has."""
    parameters: Collection[str]
    """Those that an export's dtype is for; buffers keep theirs."""

    @classmethod
    def of(cls, config: Any, name: str | None = None) -> "Export":
        """Of a config of ours, of family `name`; ConfigError where transformers has no such model."""
        theirs, format = encode_config(hf_formats(name), config)
        with torch.device("meta"):
            model = config.build()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        weights, parameters = format.weights, [name for name, _ in model.named_parameters()]
        wanted = pieces(weights, shapes)
        return cls(theirs, wanted, weights, shapes, only_ours(weights, shapes), parameters)


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    assets: str | Path | None = None,
    name: str | None = None,
) -> None:
    """Save a model as a folder that `from_pretrained` of transformers opens. Collective on ranks.

    `dtype` is that of the files' parameters, by default the model's. Tokenizer files and the
    generation config are copied from the folder `assets`. `name` is the model's family, where it is
    not one of this package. Raises ConfigError where the folder has files, or transformers has no
    such model.
    """
    export = Export.of(model.config, name)
    with published(Path(folder)) as temporary:
        save(model.state_dict(), export, temporary, dtype, assets)


def save(
    state: Mapping[str, torch.Tensor],
    export: Export,
    folder: Path,
    dtype: torch.dtype | None,
    assets: str | Path | None,
) -> None:
    """Write a model's tensors, of any layout, into a folder that is there. Collective."""
    parts = folder / "parts"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is enough
        dcp.save({MODEL.rstrip("."): state}, checkpoint_id=parts)
    work = partial(write, export, parts, folder, dtype, assets)
    if dist.is_initialized():
        on_all_ranks(work)  # a rank that fails must not leave the others waiting
    else:
        work()
    if rank() == 0:
        shutil.rmtree(parts)


def write(
    export: Export,
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None,
    assets: str | Path | None,
    progress_bar: bool = False,
) -> None:
    """Write this rank's files of a checkpoint's weights; rank 0 writes what is not weights.

    Raises ConfigError where the checkpoint is not of this model, or has what no file can say.
    """
    reader = FileSystemReader(checkpoint)
    _refuse_others(export, reader)
    saved = reader.read_metadata().state_dict_metadata
    dtypes = {name: tensor.properties.dtype for name, tensor in saved.items() if name.startswith(MODEL)}
    dtypes |= {MODEL + name: dtype for name in export.parameters if dtype}
    num_bytes = {p.theirs: prod(p.shape) * dtypes[MODEL + p.ours].itemsize for p in export.pieces}
    files = _files(export.pieces, num_bytes)
    mine = list(files.items())[rank() :: num_ranks()]
    total = sum(num_bytes[piece.theirs] for _, held in mine for piece in held)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress_bar) as bar:
        for name, held in mine:
            save_file(_read(held, reader, dtypes), folder / name, metadata={"format": "pt"})
            bar.update(sum(num_bytes[piece.theirs] for piece in held))
    if rank() == 0:
        if len(files) > 1:
            weight_map = {p.theirs: name for name, held in files.items() for p in held}
            metadata = {"total_size": sum(num_bytes.values())}
            write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
        embedding = dtypes[MODEL + export.pieces[0].ours]
        write_config(folder, export.config, embedding, None if assets is None else Path(assets))


def _refuse_others(export: Export, reader: FileSystemReader) -> None:
    """Raise ConfigError where a checkpoint has other weights than the model, or what no file can say."""
    saved = reader.read_metadata().state_dict_metadata
    found = {n.removeprefix(MODEL): t.size for n, t in saved.items() if n.startswith(MODEL)}
    # How a run balances its experts is not a question of what the model is.
    expected, found = (
        {name: shape for name, shape in shapes.items() if not is_statistic(export.weights, name)}
        for shapes in (export.shapes, found)
    )
    faults = list(mismatches(reader.path, expected, found))
    if not faults:
        zeros = [name for name, rule in export.left_out.items() if rule.must_be_zero]
        boxes = {MODEL + n: Box((0,) * len(found[n]), tuple(found[n])) for n in zeros}
        tensors = read_boxes(boxes, reader, dict.fromkeys(boxes, torch.float32))
        trained: dict[str, list[str]] = {}
        for name in zeros:
            if tensors[MODEL + name].any():
                trained.setdefault(export.left_out[name].reason, []).append(name)
        for reason, (name, *others) in trained.items():
            more = f", and {len(others)} more are not" if others else ""
            faults.append(Fault(name, f"is not zero in {reader.path}{more}: {reason}."))
    if faults:
        raise ConfigError(faults)


def _files(pieces: Sequence[Piece], num_bytes: Mapping[str, int]) -> dict[str, list[Piece]]:
    """What is in each file."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        size += num_bytes[piece.theirs]
        if size > MAX_FILE_BYTES and groups[-1]:
            groups.append([])
            size = num_bytes[piece.theirs]
        groups[-1].append(piece)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": held for i, held in enumerate(groups, 1)}


def _read(
    held: Sequence[Piece], reader: FileSystemReader, dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """A file's tensors; of each tensor of ours, what lies around its pieces is read at once."""
    boxes: dict[str, Box] = {}
    for piece in held:
        name, box = MODEL + piece.ours, Box(piece.offsets, piece.sizes)
        boxes[name] = boxes[name].joined(box) if name in boxes else box
    parts = read_boxes(boxes, reader, dtypes)
    return {
        p.theirs: p.write(boxes[MODEL + p.ours].cut(parts[MODEL + p.ours], p.offsets, p.sizes))
        for p in held
    }
