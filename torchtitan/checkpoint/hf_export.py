"""Hugging Face folders from checkpoints: safetensors, config.json, and what belongs to a tokenizer.

A model is first saved as a distributed checkpoint, whatever its layout; then each rank writes some of
the files, and reads for each what it holds. So no rank needs memory for more than one file.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from torchtitan.checkpoint.hf_files import CONFIG, INDEX, SINGLE, read_json
from torchtitan.checkpoint.hf_pieces import Piece, only_ours, pieces
from torchtitan.checkpoint.hf_reader import Box, read_boxes
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.models.hf_format import write_config
from torchtitan.models.registry import hf_formats

MAX_FILE_BYTES = 5 * 10**9
"""Of tensors in one file; a larger tensor has a file of its own."""

MODEL = "model."
"""What begins the names of weights in our checkpoints."""

_ASSETS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
_ASSETS += ("chat_template*", "generation_config.json")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Export:
    """A model as a Hugging Face folder has it."""

    config: Mapping[str, Any]
    """config.json, but for the dtype and the ids of special tokens."""
    pieces: Sequence[Piece]
    zeros: Mapping[str, str]
    """Tensors of ours that no file has, so that they must be all zeros; and why there is none."""
    parameters: frozenset[str]
    """Those of our tensors that the export's dtype is for; buffers keep theirs."""

    @classmethod
    def of(cls, config: Any, name: str | None = None) -> "Export":
        """Of a config of ours, of family `name`; ConfigError where transformers has no such model."""
        theirs, format = write_config(hf_formats(name), config)
        with torch.device("meta"):
            model = config.build()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        try:
            wanted = pieces(format.weights, shapes)
        except LookupError as error:
            reason = f"a {format.architecture} cannot hold this model: {error}."
            raise ConfigError([Fault("model.overrides", reason)]) from None
        rules = only_ours(format.weights, shapes)
        zeros = {name: rule.reason for name, rule in rules.items() if rule.must_be_zero}
        return cls(theirs, wanted, zeros, frozenset(dict(model.named_parameters())))


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    assets: str | Path | None = None,
    name: str | None = None,
) -> None:
    """Save a model as a folder that `from_pretrained` of transformers opens; collective on ranks.

    `dtype` is that of the files' weights, by default the model's. Tokenizer files and the generation
    config are copied from the folder `assets`. `name` is the model's family, where it is not one of
    this package. Raises ConfigError where the folder has files, or transformers has no such model.
    """
    export = Export.of(model.config, name)
    with published(Path(folder)) as temporary:
        save(model.state_dict(), export, temporary, dtype, assets)


def save(
    state: dict[str, torch.Tensor],
    export: Export,
    folder: Path,
    dtype: torch.dtype | None,
    assets: str | Path | None,
) -> None:
    """Write a model's tensors into a folder that is there. Collective."""
    parts = folder / "parts"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is enough
        dcp.save({MODEL.rstrip("."): state}, checkpoint_id=parts)
    write(export, parts, folder, dtype, assets)
    _barrier()
    if _rank() == 0:
        shutil.rmtree(parts)


def write(
    export: Export,
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None,
    assets: str | Path | None,
    report: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write this rank's files of a checkpoint's weights; rank 0 writes what is not weights.

    report(bytes) is called after each file. Raises ConfigError where the checkpoint is not of this
    model, or has what the files cannot say.
    """
    reader = FileSystemReader(checkpoint)
    dtypes = _dtypes(export, reader, dtype)
    _check_zeros(export, reader, dtypes)
    files = _files(export.pieces, {p.theirs: dtypes[MODEL + p.ours].itemsize for p in export.pieces})
    for i, (name, held) in enumerate(files.items()):
        if i % _num_ranks() == _rank():
            tensors = _read(held, reader, dtypes)
            save_file(tensors, folder / name, metadata={"format": "pt"})
            report(sum(tensor.nbytes for tensor in tensors.values()))
    if _rank() == 0:
        if len(files) > 1:
            total = sum(prod(p.shape) * dtypes[MODEL + p.ours].itemsize for p in export.pieces)
            weight_map = {p.theirs: name for name, held in files.items() for p in held}
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        embedding = dtypes[MODEL + export.pieces[0].ours]
        _write_config(export, folder, embedding, None if assets is None else Path(assets))


class published:
    """A temporary folder that takes its final name when all in it is written; collective on ranks."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.temporary = folder.with_name(f"{folder.name}.tmp")

    def __enter__(self) -> Path:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError([Fault(str(self.folder), "is there already.", "Name a new folder.")])
        if _rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)
        _barrier()
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        _barrier()
        if _rank() == 0:
            self.temporary.replace(self.folder)
        _barrier()


def _dtypes(
    export: Export, reader: FileSystemReader, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Of what is written, by the names in the checkpoint, which must have all of the model."""
    saved = reader.read_metadata().state_dict_metadata
    ours = {p.ours: None for p in export.pieces} | dict.fromkeys(export.zeros)
    if missing := [name for name in ours if MODEL + name not in saved]:
        fault = Fault(str(reader.path), f"the checkpoint lacks {', '.join(missing)}.")
        raise ConfigError([fault])
    return {
        MODEL + name: dtype if dtype and name in export.parameters else saved[MODEL + name].properties.dtype
        for name in ours
    }


def _check_zeros(
    export: Export, reader: FileSystemReader, dtypes: Mapping[str, torch.dtype]
) -> None:
    saved = reader.read_metadata().state_dict_metadata
    names = [MODEL + name for name in export.zeros]
    boxes = {n: Box((0,) * len(saved[n].size), tuple(saved[n].size)) for n in names}
    found = read_boxes(boxes, reader, dtypes) if boxes else {}
    faults = [
        Fault(name, f"is not zero in {reader.path}, and no file can have it: {reason}.")
        for name, reason in export.zeros.items()
        if found[MODEL + name].any()
    ]
    if faults:
        raise ConfigError(faults)


def _files(
    pieces: Sequence[Piece], itemsizes: Mapping[str, int]
) -> dict[str, list[Piece]]:
    """What is in each file."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        num_bytes = prod(piece.shape) * itemsizes[piece.theirs]
        if size + num_bytes > MAX_FILE_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": held for i, held in enumerate(groups, 1)}


def _read(
    held: Sequence[Piece], reader: FileSystemReader, dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """A file's tensors."""
    boxes: dict[str, Box] = {}
    for piece in held:
        box = Box(piece.offsets, piece.sizes)
        name = MODEL + piece.ours
        boxes[name] = boxes[name].joined(box) if name in boxes else box
    parts = read_boxes(boxes, reader, dtypes)
    tensors = {}
    for piece in held:
        box, part = boxes[MODEL + piece.ours], parts[MODEL + piece.ours]
        starts = [offset - first for offset, first in zip(piece.offsets, box.offsets)]
        inside = tuple(slice(start, start + size) for start, size in zip(starts, piece.sizes))
        tensors[piece.theirs] = piece.write(part[inside])
    return tensors


def _write_config(export: Export, folder: Path, dtype: torch.dtype, assets: Path | None) -> None:
    tokens = {name: None for name in _TOKENS}
    if assets is not None:
        for pattern in _ASSETS:
            for file in assets.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        tokens |= _special_tokens(assets)
    # As transformers 4 calls it; 5 reads it too.
    dtype_name = {"torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(folder / CONFIG, {**export.config, **tokens, **dtype_name})
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})


def _special_tokens(assets: Path) -> Iterator[tuple[str, int]]:
    """Ids from a folder's config.json, or else by the names that its tokenizer gives them."""
    if (assets / CONFIG).exists():
        config = read_json(assets / CONFIG)
        return ((key, config[key]) for key in _TOKENS if key in config)
    if not (assets / "tokenizer.json").exists() or not (assets / "tokenizer_config.json").exists():
        return iter(())
    added = read_json(assets / "tokenizer.json").get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    names = read_json(assets / "tokenizer_config.json")
    tokens = {key: names.get(key.removesuffix("_id")) for key in _TOKENS}
    contents = {k: t["content"] if isinstance(t, dict) else t for k, t in tokens.items()}
    return ((key, ids[content]) for key, content in contents.items() if content in ids)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
