"""Which checkpoint does a run start from?"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.checkpoint import storage
from torchtitan.checkpoint.hf_run import is_hugging_face
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import Checkpoint, JobConfig
from torchtitan.logging import logger

Progress = dict[str, Any]
"""What a run must know beside its tensors, JSON-able."""
BESIDE_TRAINING = {"job", "metrics", "profiling", "comm"}
"""Sections of the config that do not change what is trained."""


def find_checkpoint(
    config: Checkpoint,
    dump_folder: Path,
    assets: Path,
    altered: Mapping[Path, str] | None = None,
    whole_config: JobConfig | None = None,
) -> Path | None:
    """The newest whole checkpoint of the run, or load_step, or else initial_load_path, or none.

    In place of load_step it is what `whole_config` itself has saved since: training from there or from
    load_step gives the same. `assets` is model.hf_assets_path, where initial_load_in_hf looks without a
    path. `altered` are damaged ones, each with what is wrong, beside those that are seen to be by a look
    at the sizes of their files. Raises ConfigError where a checkpoint that was asked for is not there or
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
        own = [path for path in own if _goes_on(path, config.load_step, whole_config)]
        if not own:
            raise ConfigError([_no_such_step(config.load_step, folder)])
    faults = []
    for path in own:
        what = (altered or {}).get(path) or _damage(path)
        if not what:
            if config.load_step not in (-1, storage.step_of(path)):
                logger.info(
                    f"checkpoint.load_step = {config.load_step}: goes on from {path}, which this "
                    "configuration has saved since"
                )
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
        if not is_hugging_face(path):
            reason = f"{path} has no config.json, which every folder of transformers' weights has."
            remedy = "Name such a folder in checkpoint.initial_load_path."
            raise ConfigError([Fault("checkpoint.initial_load_in_hf", reason, remedy, True)])
        return path
    if config.initial_load_path is None:
        return None
    return _initial(Path(config.initial_load_path), altered or {})


def what_is_left(whole_config: JobConfig) -> str:
    """What a run that ends in the middle says of how to go on."""
    config = whole_config.checkpoint
    if not config.enable or config.load_only:
        key = "load_only = true" if config.enable else "enable = false"
        return f"nothing of it is saved (checkpoint.{key})"
    own = storage.candidates(own_folder(config, Path(whole_config.job.dump_folder)))
    if config.load_step != -1:
        own = [path for path in own if _goes_on(path, config.load_step, whole_config)]
    if own:
        return f"the same command goes on from {own[0]}"
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


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config, as tables, of the run that has saved a checkpoint."""
    return storage.read_manifest(checkpoint)["origin"]["config"]


def _goes_on(checkpoint: Path, load_step: int, config: JobConfig | None) -> bool:
    """Whether a run with this load_step may start from a checkpoint: that step, or its own later one."""
    step = storage.step_of(checkpoint)
    return step == load_step or (config is not None and step > load_step and _made_by(config, checkpoint))


def _made_by(config: JobConfig, checkpoint: Path) -> bool:
    """Whether a run with this config has saved it; a seed or batch size that is left open may be any."""
    try:
        theirs = read_config(checkpoint)
    except (OSError, ValueError, KeyError):  # damaged, or of an earlier version
        return False
    ours = json.loads(json.dumps(asdict(config)))  # lists for tuples, as in a manifest
    for section, key, open_value in (("debug", "seed", None), ("training", "global_batch_size", -1)):
        if ours[section][key] == open_value:
            ours[section][key] = theirs.get(section, {}).get(key)
    return all(theirs.get(name) == ours[name] for name in ours.keys() - BESIDE_TRAINING)


def _initial(path: Path, altered: Mapping[Path, str]) -> Path:
    what = altered.get(path) or _damage(path)
    if what:
        reason = f"is not a whole checkpoint: {what}." if path.is_dir() else "no such folder."
        remedy = "Give a folder like .../checkpoint/step-1000."
        if is_hugging_face(path):
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
