"""Models from Hugging Face folders: config.json and safetensors, into any layout."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtitan.checkpoint.hf_files import (
    CONFIG,
    EIGHT_BITS,
    SCALE_SUFFIX,
    BlockScales,
    TensorFiles,
    block_scales,
    read_json,
)
from torchtitan.checkpoint.hf_pieces import Piece, is_dropped, pieces, twins
from torchtitan.checkpoint.hf_reader import PieceReader, read_into
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import JobConfig, Training
from torchtitan.models.hf_format import HFFormat, differences, read_config
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
    reader = _reader(folder, theirs, config, format, "quantization_config" in theirs)
    with torch.device("meta"):
        model = config.build()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.fill_buffers(device)
    fill(model.state_dict(), reader)
    return model.eval()


def fill(state: Mapping[str, torch.Tensor], reader: PieceReader) -> None:
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
        return theirs, *read_config(formats, theirs)
    except ConfigError as error:
        faults = [replace(fault, setting=f"{path}: {fault.setting}") for fault in error.faults]
        raise ConfigError(faults) from None


def _reader(
    folder: Path, theirs: Mapping[str, Any], config: Any, format: HFFormat, quantized: bool
) -> PieceReader:
    scales = block_scales(theirs, folder / CONFIG) if quantized else None
    files = TensorFiles(folder)
    wanted = pieces(format.weights, tensor_shapes(config))
    names = {piece.theirs for piece in wanted}
    others = [name for name in files.shapes if name not in names]
    copies = twins(format.weights, others)
    others = [name for name in others if not is_dropped(format.weights, name, config.n_layers)]
    expected = {piece.theirs: piece.shape for piece in wanted}
    expected |= {name: expected[of] for name, of in copies.items() if of in expected}
    if scales is not None:
        expected |= _shapes_of_scales(scales, expected, files)
    if faults := list(_faults(folder, expected, files, others, quantized)):
        raise ConfigError(faults)
    source = files.source if scales is None else lambda name: scales.source(files, name)
    return PieceReader(folder, wanted, source, {of: name for name, of in copies.items()})


def _shapes_of_scales(
    scales: BlockScales, expected: Mapping[str, tuple[int, ...]], files: TensorFiles
) -> dict[str, tuple[int, ...]]:
    quantized = [name for name in expected if files.dtypes.get(name) == EIGHT_BITS]
    return {name + SCALE_SUFFIX: scales.shape(expected[name]) for name in quantized}


def _faults(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    files: TensorFiles,
    others: Sequence[str],
    quantized: bool,
) -> Iterator[Fault]:
    """Every way in which files hold something else than is expected of them."""
    in_bytes = sorted(name for name in expected if files.dtypes.get(name) == EIGHT_BITS)
    if in_bytes and not quantized:
        reason = f"the weights in {folder} are quantized, {in_bytes[0]} among them."
        yield Fault(QUANTIZED, reason, "Set it to true.", value=False)
        return
    if missing := sorted(expected.keys() - files.shapes.keys()):
        yield Fault(str(folder), f"the files lack {', '.join(missing)}.")
    if extra := sorted(set(others) - expected.keys()):
        yield Fault(str(folder), f"the model has no place for {', '.join(extra)}.")
    misshapen = [
        f"{name} {list(files.shapes[name])} in place of {list(shape)}"
        for name, shape in sorted(expected.items())
        if files.shapes.get(name, shape) != shape
    ]
    if misshapen:
        yield Fault(str(folder), f"of another shape than in the model: {', '.join(misshapen)}.")
