"""Does a checkpoint fit the run that starts from it, and what does the run take over?

A checkpoint is the run's `own` where the run saves its own beside it; else a new run begins with it.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from torchtitan.checkpoint.find import Progress, read_progress
from torchtitan.checkpoint.hf_pieces import mismatches
from torchtitan.checkpoint.hf_run import HuggingFace, is_hugging_face
from torchtitan.checkpoint.storage import MODEL
from torchtitan.config.batch_size import global_batch_size
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import Checkpoint, Training


def saved_tensors(checkpoint: Path) -> Mapping[str, Any]:
    """By name, what a checkpoint of ours says of its tensors: their shapes and dtypes."""
    return FileSystemReader(checkpoint).read_metadata().state_dict_metadata


def begins_anew(config: Checkpoint, own: bool) -> bool:
    """Whether a run takes over weights alone, and counts its steps from the first."""
    return not own and config.initial_load_model_only


def takes_optimizer(checkpoint: Path, config: Checkpoint, own: bool) -> bool:
    """Whether a run goes on with the state of the checkpoint's optimizer."""
    if begins_anew(config, own) or "optimizer" in config.exclude_from_loading:
        return False
    return not read_progress(checkpoint)["model_only"]


def check_hugging_face(checkpoint: Path, hf: HuggingFace, config: Checkpoint, own: bool) -> None:
    """Raise ConfigError where a folder that is read as Hugging Face's is not one of this model."""
    if is_hugging_face(checkpoint) or (config.initial_load_in_hf and not own):
        hf.check_load(checkpoint, config.initial_load_in_hf_quantized and not own)


def check_weights(checkpoint: Path, model_config: Any) -> None:
    """Raise ConfigError where a checkpoint of ours lacks weights of the model, or has others.

    Statistics may begin anew.
    """
    found = {
        name.removeprefix(MODEL): tensor.size
        for name, tensor in saved_tensors(checkpoint).items()
        if name.startswith(MODEL) and not name.endswith(".previous_load")
    }
    with torch.device("meta"):
        built = model_config.build()
    weights = dict(built.named_parameters())
    expected = {
        name: tensor.shape
        for name, tensor in built.state_dict().items()
        if name in weights or name in found
    }
    if faults := list(mismatches(checkpoint, expected, found)):
        raise ConfigError(faults)


def progress_taken_over(
    checkpoint: Path, config: Checkpoint, own: bool, num_steps: int
) -> Progress:
    """What a run of `num_steps` takes over beside tensors; nothing where it begins anew.

    Raises ConfigError where the run would go on training from weights alone.
    """
    if begins_anew(config, own):
        return {}
    progress = read_progress(checkpoint)
    if progress["step"] == 0:  # a seed checkpoint: weights for a new run
        return {}
    if progress["model_only"] and not progress.get("data_ended") and progress["step"] < num_steps:
        raise ConfigError([_weights_alone(checkpoint, config, own)])
    excluded = set(config.exclude_from_loading)
    parts = {"train_state": ("step", "n_tokens_seen"), "dataloader": ("slots", "global_batch_size")}
    dropped = {key for part in excluded & set(parts) for key in parts[part]}
    return {key: value for key, value in progress.items() if key not in dropped}


def _weights_alone(checkpoint: Path, config: Checkpoint, own: bool) -> Fault:
    reason = f"{checkpoint} holds only the weights, so training cannot go on from it."
    if own:
        remedy = (
            "Load an earlier step, or start a new run from it by checkpoint.initial_load_path, with "
            "another job.dump_folder. "
            "checkpoint.last_save_model_only = false keeps the last save complete."
        )
        return Fault("checkpoint.load_step", reason, remedy, config.load_step)
    remedy = "Set it to true to begin a new run with them."
    return Fault("checkpoint.initial_load_model_only", reason, remedy, False)


def resumed_batch_size(config: Training, dp: int, progress: Progress) -> int:
    """The run's global batch size on `dp` data-parallel ranks: a resumed run keeps what it began with.

    Raises ConfigError where the config asks for another one, or ranks would get unequal shares.
    """
    saved = progress.get("global_batch_size")
    if saved is None:
        return global_batch_size(config, dp)
    if config.global_batch_size not in (-1, saved):
        fault = Fault(
            "training.global_batch_size",
            f"the checkpoint's data position belongs to batches of {saved} sequences.",
            f"Use {saved}, or set checkpoint.exclude_from_loading = ['dataloader'] to begin the data anew.",
            value=config.global_batch_size,
        )
        raise ConfigError([fault])
    return global_batch_size(replace(config, global_batch_size=saved), dp)
