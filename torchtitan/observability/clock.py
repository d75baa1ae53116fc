"""Where does the time go? The start of a run, and then its steps between two logs."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Lap:
    """The steps since the last log."""

    num_steps: int
    seconds: float
    """In training steps: waiting for data included, pauses (validation, checkpoints) not."""
    data_seconds: float
    wall_seconds_per_step: float | None
    """Pauses included and the first lap left out (it compiles and warms up); None in that lap."""


class StepClock:
    """Times laps of training steps; `now` gives seconds."""

    def __init__(self, step: int, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._lap_step, self._lap_start = step, now()
        self._data_seconds = 0.0
        self._paused_seconds = 0.0
        self._pause_start: float | None = None
        self._warm: tuple[int, float] | None = None
        """Step and time at the end of the first lap."""

    @contextmanager
    def loading_data(self) -> Iterator[None]:
        start = self._now()
        yield
        self._data_seconds += self._now() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        assert self._pause_start is None, "paused inside a pause"
        self._pause_start = self._now()
        try:
            yield
        finally:  # a save after a failed validation pauses again
            self._paused_seconds += self.seconds_into_pause()
            self._pause_start = None

    def seconds_into_pause(self) -> float:
        assert self._pause_start is not None, "not inside paused()"
        return self._now() - self._pause_start

    def lap(self, step: int) -> Lap:
        """End a lap after training step `step`, and begin the next."""
        num_steps = step - self._lap_step
        assert num_steps > 0, f"step {step} is logged after step {self._lap_step}"
        now = self._now()
        wall = None
        if self._warm is None:
            self._warm = (step, now)
        else:
            wall = (now - self._warm[1]) / (step - self._warm[0])
        seconds = now - self._lap_start - self._paused_seconds
        lap = Lap(num_steps, seconds, self._data_seconds, wall)
        self._lap_step, self._lap_start = step, now
        self._data_seconds = self._paused_seconds = 0.0
        return lap


class DeviceTimer:
    """Times a part of every step on the device that does the work; no host waits for it.

    On a GPU from the moment it reaches that part to the moment it has done it, by events in its
    stream; on a CPU by the clock.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self._on_gpu, self._now = device.type == "cuda", now
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if not self._on_gpu:
            start = self._now()
            yield
            self._seconds += self._now() - start
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def read(self) -> float:
        """Seconds since the last reading. The GPU must have done that part: wait for what it gave."""
        seconds = self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        self._seconds, self._events = 0.0, []
        return seconds


class StartClock:
    """How long a run takes to start, part by part; the first part began with the process."""

    def __init__(self):
        self._ends = [("", time.perf_counter() - _seconds_since_the_process_began())]

    def done(self, part: str) -> None:
        self._ends.append((part, time.perf_counter()))

    def report(self) -> str:
        """Seconds in all, and of each part."""
        parts = ", ".join(
            f"{part} {end - start:.2f}"
            for (_, start), (part, end) in zip(self._ends, self._ends[1:], strict=False)
        )
        return f"{self._ends[-1][1] - self._ends[0][1]:.2f} s from the start: {parts}"


def _seconds_since_the_process_began() -> float:
    stat = Path("/proc/self/stat")
    if not stat.exists():  # not on Linux: imports are not counted
        return 0.0
    began = int(stat.read_text().rpartition(")")[2].split()[19])  # proc(5): starttime, in clock ticks
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
