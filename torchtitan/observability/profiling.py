"""What do the devices do, and what fills their memory? Traces and allocator snapshots of steps."""

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import Profiling
from torchtitan.logging import logger

MAX_SNAPSHOT_EVENTS = 100_000
"""Allocations and frees kept in a snapshot's history: tens of MB on disk."""


class StepRecorders(ExitStack):
    """The recorders a config asks for: enter around the training loop, step() after each step."""

    def __init__(
        self, config: Profiling, dump_folder: str, *, rank: int, device: torch.device, step: int
    ):
        """`step` is 0, or the step the run resumes from: cycles end at multiples of profile_freq.

        Raises ConfigError where the device has no allocator to take snapshots of.
        """
        super().__init__()
        folder = Path(dump_folder)
        self._recorders: list[TraceRecorder | MemoryRecorder] = []
        if config.enable_profiling:
            traces = folder / config.save_traces_folder
            self._recorders.append(
                TraceRecorder(config, traces, rank=rank, device=device, step=step)
            )
        if config.enable_memory_snapshot:
            check_memory_snapshot(config, device)
            snapshots = folder / config.save_memory_snapshot_folder
            self._recorders.append(
                MemoryRecorder(config.profile_freq, snapshots, rank=rank, step=step)
            )

    def __enter__(self):
        for recorder in self._recorders:
            self.enter_context(recorder)
        return self

    def step(self) -> None:
        for recorder in self._recorders:
            recorder.step()


def check_memory_snapshot(config: Profiling, device: torch.device) -> None:
    """Raise ConfigError if snapshots are asked for on a device other than a GPU."""
    if config.enable_memory_snapshot and device.type != "cuda":
        reason = f"snapshots record the allocator of a CUDA device, and this run is on {device.type}."
        remedy = "Set it to false, or use profiling.enable_profiling."
        raise ConfigError([Fault("profiling.enable_memory_snapshot", reason, remedy, True)])


class TraceRecorder(AbstractContextManager):
    """torch.profiler in cycles of profile_freq steps, of which the last ones are recorded."""

    def __init__(
        self, config: Profiling, folder: Path, *, rank: int, device: torch.device, step: int
    ):
        recorded = config.profiler_warmup + config.profiler_active
        assert recorded <= config.profile_freq, (
            f"{recorded} steps in a cycle of {config.profile_freq}"
        )
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        cycle = torch.profiler.schedule(
            wait=config.profile_freq - recorded,
            warmup=config.profiler_warmup,
            active=config.profiler_active,
        )
        self._folder, self._rank, self._freq = folder, rank, config.profile_freq
        self._first_step = step
        self._num_traces = 0
        self._profiler = torch.profiler.profile(
            activities=activities,
            # The profiler counts from 0 in every process, the cycles from the run's first step.
            schedule=lambda num_steps: cycle(self._first_step + num_steps),
            on_trace_ready=self._save,
            record_shapes=True,
        )

    def __enter__(self):
        self._profiler.__enter__()
        return self

    def step(self) -> None:
        self._profiler.step()

    def __exit__(self, *error) -> None:
        self._profiler.__exit__(*error)
        if not self._num_traces:
            logger.warning(
                f"profiling.profile_freq = {self._freq}: the run ended before its first trace"
            )

    def _save(self, profiler: torch.profiler.profile) -> None:
        path = (
            self._folder
            / f"step_{self._first_step + profiler.step_num}"
            / f"rank_{self._rank}.json.gz"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        self._num_traces += 1
        logger.info(f"profiler trace: {path}")


class MemoryRecorder(AbstractContextManager):
    """The CUDA allocator's history, written every `freq` steps and when memory runs out."""

    def __init__(self, freq: int, folder: Path, *, rank: int, step: int):
        self._freq, self._folder, self._rank, self._step = freq, folder, rank, step

    def __enter__(self):
        torch.cuda.memory._record_memory_history(max_entries=MAX_SNAPSHOT_EVENTS)
        return self

    def step(self) -> None:
        self._step += 1
        if self._step % self._freq == 0:
            self._save(f"step_{self._step}")

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is not None and issubclass(error_type, torch.OutOfMemoryError):
            self._save(f"step_{self._step + 1}_out_of_memory")
        torch.cuda.memory._record_memory_history(enabled=None)

    def _save(self, name: str) -> None:
        path = self._folder / name / f"rank_{self._rank}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        logger.info(f"memory snapshot: {path}")
