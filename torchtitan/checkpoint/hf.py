"""Models from Hugging Face folders: config.json and safetensors, into any layout."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtitan.checkpoint.hf_files import (
    DTYPES,
    EIGHT_BITS,
    SCALE_SUFFIX,
    TensorFiles,
    block_scales,
    read_json,
)
from torchtitan.checkpoint.hf_names import CONFIG
from torchtitan.checkpoint.hf_pieces import is_dropped, mismatches, pieces, twins
from torchtitan.checkpoint.hf_reader import PieceReader, read_into
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import JobConfig, Training
from torchtitan.models.hf_format import HFFormat, decode_config, differences
from torchtitan.models.registry import hf_formats

QUANTIZED = "checkpoint.initial_load_in_hf_quantized"


def load_pretrained(
    folder: str | Path,
    seq_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model of a folder, in evaluation mode: model(tokens (B, L)) -> logits (B, L, V).

    `seq_len` is the longest L, by default all that the positions are meant for. Block-quantized
    weights are dequantized. Raises ConfigError, which names every field of config.json that matters
    and is not supported, and every tensor that is missing, unknown or of another shape.
    """
    folder, device = Path(folder), torch.device(device)
    theirs, config, format = _understood(folder, hf_formats())
    seq_len = seq_len or config.max_seq_len
    config = config.update_from_config(JobConfig(training=Training(seq_len=seq_len)))
    reader = _reader(folder, theirs, config, format, is_quantized(folder))
    with torch.device("meta"):
        model = config.build()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.fill_buffers(device)
    fill_tensors(model.state_dict(), reader)
    return model.eval()


def fill_tensors(state: Mapping[str, torch.Tensor], reader: PieceReader) -> None:
    """Fill tensors of any layout, in place, as far as files have them. Not collective."""
    known = reader.metadata.state_dict_metadata
    read_into({name: tensor for name, tensor in state.items() if name in known}, reader)


def open_folder(folder: Path, config: Any, name: str, quantized: bool) -> PieceReader:
    """A reader of files that hold all of a model and nothing else; only their headers are read.

    Raises ConfigError, which names every way in which the folder does not.
    """
    theirs, found, format = _understood(folder, hf_formats(name))
    faults = [
        Fault(f"model.overrides.{path}", f"{folder / CONFIG} says {value!r}.", value=ours)
        for path, ours, value in differences(config, found)
    ]
    if faults:
        raise ConfigError(faults)
    return _reader(folder, theirs, config, format, quantized)


def is_quantized(folder: Path) -> bool:
    """Whether a folder's config.json says that its weights are quantized."""
    return bool(read_json(folder / CONFIG).get("quantization_config"))


def tensor_shapes(config: Any) -> dict[str, torch.Size]:
    """Of a whole model's parameters and saved buffers."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in config.build().state_dict().items()}


def _understood(
    folder: Path, formats: Sequence[HFFormat]
) -> tuple[Mapping[str, Any], Any, HFFormat]:
    """A folder's config.json, and what it is as a config of ours."""
    path = folder / CONFIG
    theirs = read_json(path)
    try:
        return theirs, *decode_config(formats, theirs)
    except ConfigError as error:
        faults = [replace(fault, setting=f"{path}: {fault.setting}") for fault in error.faults]
        raise ConfigError(faults) from None


def _reader(
    folder: Path, theirs: Mapping[str, Any], config: Any, format: HFFormat, quantized: bool
) -> PieceReader:
    scales = block_scales(theirs, folder / CONFIG) if quantized else None
    files = TensorFiles(folder)
    wanted = pieces(format.weights, tensor_shapes(config))
    expected = {piece.theirs: piece.shape for piece in wanted}
    others = [name for name in files.shapes if name not in expected]
    copies = twins(format.weights, others)
    dropped = {name for name in others if is_dropped(format.weights, name, config.n_layers)}
    expected |= {name: expected[of] for name, of in copies.items()}
    in_blocks = [name for name in expected if files.dtypes.get(name) == EIGHT_BITS]
    if scales is not None:
        expected |= {name + SCALE_SUFFIX: scales.shape(expected[name]) for name in in_blocks}
    elif in_blocks:
        reason = f"the weights in {folder} are quantized, {in_blocks[0]} among them."
        raise ConfigError([Fault(QUANTIZED, reason, "Set it to true.", value=False)])
    found = {name: shape for name, shape in files.shapes.items() if name not in dropped}
    faults = list(mismatches(folder, expected, found))
    for name in sorted(expected.keys() & found.keys()):
        if files.dtypes[name] not in DTYPES:
            faults.append(Fault(str(folder), f"{name} has dtype {files.dtypes[name]}."))
    if faults:
        raise ConfigError(faults)
    return PieceReader(folder, wanted, files, scales, {of: name for name, of in copies.items()})
