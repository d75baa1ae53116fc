"""When a run is asked to save and end, to be started again: by a signal, or by its wall time.

Slurm sends SIGUSR1 or SIGTERM before it ends a job, clouds send SIGTERM. Only a flag is set here; the
trainer asks for it between steps, agrees on it with all ranks, saves, and ends.
"""

import os
import signal
import time
from types import FrameType

EXIT_START_AGAIN = 75
"""Exit status of a run that was saved on request (EX_TEMPFAIL of sysexits.h): start it again."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """What has asked this rank to end, if anything has."""

    def __init__(self, max_run_seconds: float | None = None):
        self._seconds = max_run_seconds
        self._started = time.monotonic()
        self._signal = ""

    def listen(self) -> None:
        """From now on the stop signals are requests. Children of this process die of them as usual."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        os.register_at_fork(after_in_child=_forget_signals)

    @property
    def reason(self) -> str:
        """In words; empty until there is one."""
        if self._signal:
            return self._signal
        if self._seconds is not None and time.monotonic() - self._started > self._seconds:
            return f"checkpoint.max_run_seconds = {self._seconds}"
        return ""

    def farewell(self, step: int) -> str:
        """What a run that was asked to end says at its end."""
        return (
            f"told to stop by {self.reason or 'another rank'}: ends after step {step} with status "
            f"{EXIT_START_AGAIN}; start the run again to go on"
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name


def _forget_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
