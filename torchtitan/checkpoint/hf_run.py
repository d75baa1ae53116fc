"""How a training run starts from a Hugging Face folder, and ends in one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchtitan.checkpoint.hf import fill_tensors, open_folder
from torchtitan.checkpoint.hf_export import Export, save
from torchtitan.checkpoint.hf_names import CONFIG
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.logging import logger

State = Mapping[str, torch.Tensor]
"""A model's parameters and saved buffers, of any layout."""


def is_hugging_face(path: Path) -> bool:
    """Whether a checkpoint is a folder of Hugging Face's, not one of our format."""
    return (path / CONFIG).exists()


@dataclass(frozen=True)
class HuggingFace:
    """A run's model, for reading and writing it as transformers has it."""

    family: str
    model_config: Any
    assets: Path
    """Folder of the tokenizer files that go with the model."""

    def check_load(self, folder: Path, quantized: bool) -> None:
        """Raise ConfigError with all that keeps a folder from being loaded; reads no weights."""
        open_folder(folder, self.model_config, self.family, quantized)

    def check_save(self) -> None:
        """Raise ConfigError where the run would train what transformers' model does not have."""
        export = Export.of(self.model_config, self.family)
        key, model = "checkpoint.last_save_in_hf", export.config["architectures"][0]
        faults = {
            rule.reason: Fault(key, f"a {model} cannot hold {name}: {rule.reason}.", value=True)
            for name, rule in export.left_out.items()
            if rule.must_be_zero
        }
        if faults:
            raise ConfigError(faults.values())

    def load(self, folder: Path, state: State, quantized: bool) -> None:
        """Fill the model's tensors in place; each rank reads what it holds of them."""
        fill_tensors(state, open_folder(folder, self.model_config, self.family, quantized))
        logger.info(f"loaded model from {folder}")

    def save(self, folder: Path, state: State, dtype: torch.dtype) -> None:
        """Write the model into a folder that is there. Collective."""
        save(state, Export.of(self.model_config, self.family), folder, dtype, self.assets)
