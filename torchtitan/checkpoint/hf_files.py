"""The safetensors files of a Hugging Face folder: what is in them, and any part of a tensor."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from torchtitan.checkpoint.hf_names import INDEX, SINGLE
from torchtitan.checkpoint.hf_pieces import Slices, Source
from torchtitan.config.faults import ConfigError, Fault

SCALE_SUFFIX = "_scale_inv"
"""Of the name of a quantized tensor's scales."""
EIGHT_BITS = "F8_E4M3"
"""safetensors' name of the dtype that blocks are quantized to."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES |= {EIGHT_BITS: torch.bfloat16}
"""What tensors are read as, by safetensors' names; quantized ones as DeepSeek converts them itself."""


class TensorFiles:
    """All tensors of a folder, by name; only the files' headers are read until parts are asked for.

    Raises ConfigError, which names the file, where one is missing or broken.
    """

    def __init__(self, folder: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        """As safetensors names them: "F32", "BF16", ..."""
        self._files: dict[str, Any] = {}
        for path in _paths(folder):
            file = _opened(path)
            for name in file.keys():
                part = file.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
                self._files[name] = file

    def source(self, name: str) -> Source:
        """Reads parts of a tensor, in the dtype of the file."""
        return lambda slices: self._files[name].get_slice(name)[slices or ...]


@dataclass(frozen=True)
class BlockScales:
    """Scales of quantized weights, one for each block of a matrix (DeepSeek-V3, section 3.3)."""

    rows: int
    columns: int

    def source(self, files: TensorFiles, name: str) -> Source:
        """Reads parts of a tensor, dequantized in fp32 where it has scales."""
        weights, scale_name = files.source(name), name + SCALE_SUFFIX
        if scale_name not in files.shapes:
            return weights
        scales = files.source(scale_name)

        def read(slices: Slices) -> torch.Tensor:
            blocks, index = [], []
            for wanted, size in zip(slices, (self.rows, self.columns)):
                first = wanted.start // size
                blocks.append(slice(first, -(-wanted.stop // size)))
                index.append(torch.arange(wanted.start, wanted.stop) // size - first)
            spread = scales(tuple(blocks)).float()[index[0]][:, index[1]]
            return weights(slices).float() * spread

        return read

    def shape(self, of: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a matrix's scales."""
        return -(-of[0] // self.rows), -(-of[1] // self.columns)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ConfigError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([Fault(str(path), "there is no such file.")]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([Fault(str(path), f"cannot be read: {error}.")]) from error
    if not isinstance(found, dict):
        raise ConfigError([Fault(str(path), f"holds {type(found).__name__}, not an object.")])
    return found


def block_scales(config: Mapping[str, Any], path: Path) -> BlockScales:
    """How a config.json says that its weights are quantized; ConfigError for other ways than ours."""
    quantization = config.get("quantization_config") or {}
    size = quantization.get("weight_block_size")
    if quantization.get("quant_method") != "fp8" or not size or len(size) != 2:
        reason = "only fp8 weights with a weight_block_size of two numbers can be dequantized."
        raise ConfigError([Fault(f"{path}: quantization_config", reason, value=quantization)])
    return BlockScales(*size)


def _paths(folder: Path) -> Iterator[Path]:
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map", {}).values()
        yield from (folder / name for name in dict.fromkeys(names))
    elif (folder / SINGLE).exists():
        yield folder / SINGLE
    else:
        raise ConfigError([Fault(str(folder), f"has neither {INDEX} nor {SINGLE}.")])


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        fault = Fault(str(path), f"is named in {INDEX} but is not there.", "Download it again.")
        raise ConfigError([fault]) from None
    except (OSError, SafetensorError) as error:
        fault = Fault(str(path), f"cannot be read: {error}.", "Download it again.")
        raise ConfigError([fault]) from error
