"""Which checkpoint does a run start from?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtitan.checkpoint import storage
from torchtitan.checkpoint.hf_run import is_folder
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import Checkpoint
from torchtitan.logging import logger

Progress = dict[str, Any]
"""What a run must know beside its tensors, JSON-able."""


def find_checkpoint(
    config: Checkpoint,
    dump_folder: Path,
    assets: Path,
    altered: Mapping[Path, str] | None = None,
) -> Path | None:
    """The newest whole checkpoint of the run, or load_step, or else initial_load_path, or none.

    `assets` is model.hf_assets_path, where initial_load_in_hf looks without a path. `altered` are
    damaged ones, each with what is wrong, beside those that are seen to be by a look at the sizes of
    their files. Raises ConfigError where a checkpoint that was asked for is not there or
    damaged, and where there are checkpoints of the run but all of them are.
    """
    if not config.enable:
        return None
    folder = own_folder(config, dump_folder)
    own = storage.candidates(folder)
    if config.create_seed_checkpoint:
        _refuse_seed_after(own)
        return None
    if config.load_step != -1:
        own = [path for path in own if storage.step_of(path) == config.load_step]
        if not own:
            raise ConfigError([_no_such_step(config.load_step, folder)])
    faults = []
    for path in own:
        what = (altered or {}).get(path) or _damage(path)
        if not what:
            return path
        logger.warning(f"{path} is damaged: {what}. It is not used.")
        faults.append(f"{path.name}: {what}")
    if faults:
        reason = f"no checkpoint there is whole ({'; '.join(faults)})."
        remedy = "Give checkpoint.load_step another step, or move these folders away to begin anew."
        raise ConfigError([Fault("checkpoint.folder", reason, remedy, str(folder))])
    if config.initial_load_in_hf:
        path = Path(config.initial_load_path or assets)
        if what := (altered or {}).get(path):
            remedy = f"Move {path / storage.MANIFEST} away if you have changed the files yourself."
            raise ConfigError([Fault("checkpoint.initial_load_in_hf", f"{path}: {what}.", remedy, True)])
        return path
    if config.initial_load_path is None:
        return None
    return _initial(Path(config.initial_load_path), altered or {})


def what_is_left(config: Checkpoint, dump_folder: Path) -> str:
    """What a run that ends in the middle says of how to go on."""
    if not config.enable or config.load_only:
        key = "load_only = true" if config.enable else "enable = false"
        return f"nothing of it is saved (checkpoint.{key})"
    if saved := storage.candidates(own_folder(config, dump_folder)):
        return f"the same command goes on from {saved[0]}"
    return "there is no checkpoint yet, and the same command begins anew"


def own_folder(config: Checkpoint, dump_folder: Path) -> Path:
    """Where a run's checkpoints are."""
    return dump_folder / config.folder


def is_own(checkpoint: Path, folder: Path) -> bool:
    """Whether a run whose checkpoints are in `folder` goes on from this one; else it begins with it."""
    return checkpoint.parent == folder


def read_progress(checkpoint: Path) -> Progress:
    """Step, tokens, seed, batch size and data position of a checkpoint."""
    return storage.read_manifest(checkpoint)["progress"]


def _initial(path: Path, altered: Mapping[Path, str]) -> Path:
    what = altered.get(path) or _damage(path)
    if what:
        reason = f"is not a whole checkpoint: {what}." if path.is_dir() else "no such folder."
        remedy = "Give a folder like .../checkpoint/step-1000."
        if is_folder(path):
            remedy = "Set checkpoint.initial_load_in_hf = true."
        elif whole := [own for own in storage.candidates(path) if not storage.damage(own)]:
            remedy = f"Use its newest checkpoint, {whole[0]}."
        raise ConfigError([Fault("checkpoint.initial_load_path", reason, remedy, str(path))])
    return path


def _damage(checkpoint: Path) -> str:
    """As storage.damage; raises ConfigError where a later version has written it."""
    what = storage.damage(checkpoint)
    version = storage.FORMAT if what else storage.read_manifest(checkpoint)["format"]
    if version > storage.FORMAT:
        reason = f"{checkpoint} has format {version}; this version knows {storage.FORMAT}."
        raise ConfigError([Fault("checkpoint.folder", reason, "Use the version that wrote it.")])
    return what


def _no_such_step(step: int, folder: Path) -> Fault:
    steps = storage.saved_steps(folder)
    nearest = sorted(sorted(steps, key=lambda other: abs(other - step))[:3])
    remedy = f"Nearest: {', '.join(map(str, nearest))}." if nearest else ""
    reason = f"no such checkpoint in {folder}."
    return Fault("checkpoint.load_step", reason, remedy, value=step)


def _refuse_seed_after(own: list[Path]) -> None:
    if own:
        reason = f"is what a run begins with, and there is {own[0]}."
        remedy = "Choose another job.dump_folder."
        raise ConfigError([Fault("checkpoint.create_seed_checkpoint", reason, remedy, True)])
