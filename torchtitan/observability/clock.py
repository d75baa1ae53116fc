"""Where does the time go? Training, waiting for data, and everything else, between two logs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
