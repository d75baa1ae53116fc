"""Where do the numbers go? JSON lines always; TensorBoard and Weights & Biases if asked."""

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import Metrics
from torchtitan.logging import logger


class Sink(Protocol):
    """A place for records: flat mappings of names to numbers, "step" among them."""

    def write(self, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_sinks(config: Metrics) -> None:
    """Raise ConfigError if the config asks for a sink whose package is not installed."""
    wanted = {
        "metrics.enable_tensorboard": (config.enable_tensorboard, "tensorboard"),
        "metrics.enable_wandb": (config.enable_wandb, "wandb"),
    }
    faults = [
        Fault(
            setting,
            f"the package {package} is not installed.",
            f"Install it (pip install {package}) or set {setting} = false.",
            value=True,
        )
        for setting, (enabled, package) in wanted.items()
        if enabled and importlib.util.find_spec(package) is None
    ]
    if faults:
        raise ConfigError(faults)


def open_sinks(
    config: Metrics, dump_folder: Path, run: Mapping[str, Any], *, rank: int, step: int
) -> list[Sink]:
    """The sinks of one rank for a run that begins after `step` (0, or the step it resumes from).

    `run` is the whole run's config as nested tables. metrics.jsonl is rank 0's in any layout; the
    others are too, or everyone's if save_for_all_ranks.
    """
    check_sinks(config)
    sinks: list[Sink] = []
    folder = dump_folder / config.save_tb_folder
    if config.save_for_all_ranks:
        folder = folder / f"rank_{rank}"
    if rank == 0:
        sinks.append(JsonLines(dump_folder / "metrics.jsonl", step))
    if rank == 0 or config.save_for_all_ranks:
        if config.enable_tensorboard:
            sinks.append(TensorBoard(folder / f"{datetime.now():%Y%m%d-%H%M%S}"))
        if config.enable_wandb:
            sinks.append(WeightsAndBiases(folder, run))
    return sinks


class JsonLines:
    """One JSON object a line. A run that resumes goes on in its file, each step there once.

    What was written after the step it resumes from is dropped, since those steps come again; a
    run that begins anew puts another's file aside. JSON has no NaN or infinities: they are
    written as the strings "NaN", "Infinity" and "-Infinity", which float() reads.
    """

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _put_aside(path) if step == 0 else _truncate(path, step)
        self._file = path.open("a", buffering=1)  # by line: a killed run keeps what it logged

    def write(self, record: Mapping[str, float]) -> None:
        finite = {key: _as_json(value) for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """One scalar a field, under the field's name."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(folder, max_queue=1000)
        logger.info(f"TensorBoard events go to {folder}")

    def write(self, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()  # a killed run keeps what it logged

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run, named and placed by WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY, WANDB_MODE, ..."""

    def __init__(self, folder: Path, run: Mapping[str, Any]):
        import wandb  # optional

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(dir=folder, config=run)
        # By our step: W&B's own counter never goes back, as a resume from an earlier step does.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, float]) -> None:
        self._run.log(dict(record))

    def close(self) -> None:
        self._run.finish()


def _as_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _put_aside(path: Path) -> None:
    written = datetime.fromtimestamp(path.stat().st_mtime)
    aside = path.with_name(f"{path.stem}.{written:%Y%m%d-%H%M%S}{path.suffix}")
    path.rename(aside)
    logger.info(f"this run starts at step 1: the metrics of an earlier one are now in {aside}")


def _truncate(path: Path, step: int) -> None:
    lines = path.read_text().splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        logger.info(f"{path}: {len(lines) - len(kept)} lines after step {step} are dropped")
    # Written anew even if all are kept: the last line may lack its newline.
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # torn by the end of a killed run
        return math.inf
