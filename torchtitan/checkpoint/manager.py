"""When a checkpoint is saved, which one is loaded, and what is in it.

A checkpoint is a folder step-N: the weights and optimizer moments in logical (layout-free) form by
torch.distributed.checkpoint, and progress.json: step, tokens, seed, batch size, data position. It is
written under a temporary name and published by one rename, so a folder named step-N is complete.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from torchtitan.checkpoint.hf_run import HuggingFace, is_folder
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import Checkpoint
from torchtitan.logging import logger

Progress = dict[str, Any]
"""What a run must know beside its tensors, JSON-able."""

_PROGRESS_FILE = "progress.json"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, oldest first."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    steps = sorted(int(name[1]) for name in names if name)
    return [step for step in steps if (folder / f"step-{step}" / _PROGRESS_FILE).exists()]


def find_checkpoint(config: Checkpoint, dump_folder: Path, assets: Path) -> Path | None:
    """The checkpoint this run starts from: one of its own, or else initial_load_path, or none.

    `assets` is model.hf_assets_path, where initial_load_in_hf looks without a path. Raises ConfigError where a checkpoint that was asked for is not there.
    """
    if not config.enable:
        return None
    folder = dump_folder / config.folder
    steps = saved_steps(folder)
    if steps and config.load_step in (-1, *steps):
        return folder / f"step-{steps[-1] if config.load_step == -1 else config.load_step}"
    if config.load_step != -1:
        nearest = sorted(steps, key=lambda step: abs(step - config.load_step))[:3]
        remedy = f"Nearest: {', '.join(map(str, sorted(nearest)))}." if nearest else ""
        reason = f"no such checkpoint in {folder}."
        fault = Fault("checkpoint.load_step", reason, remedy, value=config.load_step)
        raise ConfigError([fault])
    if config.initial_load_in_hf:
        return Path(config.initial_load_path or assets)
    if config.initial_load_path is None:
        return None
    path = Path(config.initial_load_path)
    if not (path / _PROGRESS_FILE).exists():
        reason = "is not a complete checkpoint (a folder like .../checkpoint/step-1000)."
        remedy = "Set checkpoint.initial_load_in_hf = true." if is_folder(path) else ""
        raise ConfigError([Fault("checkpoint.initial_load_path", reason, remedy, str(path))])
    return path


def read_progress(checkpoint: Path) -> Progress:
    """Step, tokens, seed, batch size and data position of a checkpoint."""
    return json.loads((checkpoint / _PROGRESS_FILE).read_text())


class CheckpointManager:
    """Saves and loads one run's model and optimizer state (tensors by name, loaded in place)."""

    def __init__(
        self,
        config: Checkpoint,
        dump_folder: Path,
        model: nn.Module,
        optimizer_state: dict[str, dict[str, torch.Tensor]],
        hf: HuggingFace | None = None,
    ):
        self.config = config
        self.folder = dump_folder / config.folder
        self.model = model
        self.optimizer_state = optimizer_state
        self.hf = hf

    def load(self, checkpoint: Path) -> None:
        """Read weights, and optimizer state unless it is excluded, in any layout. Collective."""
        own = checkpoint.parent == self.folder
        if is_folder(checkpoint):
            quantized = not own and self.config.initial_load_in_hf_quantized
            self.hf.load(checkpoint, self.model.state_dict(), quantized)
            return
        weights_only = (
            (not own and self.config.initial_load_model_only)
            or "optimizer" in self.config.exclude_from_loading
            or read_progress(checkpoint)["model_only"]
        )
        state: dict[str, Any] = {"model": self.model.state_dict()}
        if not weights_only:
            state["optimizer"] = self.optimizer_state
        dcp.load(state, checkpoint_id=checkpoint)
        logger.info(f"loaded {' and '.join(state)} from {checkpoint}")

    def wants_save(self, step: int, last: bool) -> bool:
        """Whether the run saves after `step`."""
        if not self.config.enable or self.config.load_only:
            return False
        first = step == 1 and self.config.enable_first_step_checkpoint
        return last or first or step % self.config.interval == 0

    def save(self, step: int, progress: Progress, last: bool = False) -> None:
        """Write step-`step` and publish it; on the last step maybe the weights alone. Collective."""
        model_only = last and self.config.last_save_model_only
        state: dict[str, Any] = {"model": self.model.state_dict()}
        in_hf = last and self.config.last_save_in_hf
        dtype = getattr(torch, self.config.export_dtype)
        if model_only and not in_hf:
            state["model"] = {name: t.to(dtype) for name, t in state["model"].items()}
        elif not model_only:
            state["optimizer"] = self.optimizer_state
        final, temporary = self.folder / f"step-{step}", self.folder / f"step-{step}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        if in_hf:
            self.hf.save(temporary, state["model"], dtype)
        else:
            dcp.save(state, checkpoint_id=temporary)
        if dist.get_rank() == 0:
            progress = progress | {"step": step, "model_only": model_only}
            (temporary / _PROGRESS_FILE).write_text(json.dumps(progress))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._remove_old()
        dist.barrier()
        logger.info(f"saved {' and '.join(state)} to {final}")

    def _remove_old(self) -> None:
        if self.config.keep_latest_k:
            for step in saved_steps(self.folder)[: -self.config.keep_latest_k]:
                shutil.rmtree(self.folder / f"step-{step}")
