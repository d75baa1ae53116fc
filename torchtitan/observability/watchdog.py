"""What happens when a rank is killed, freezes, fails, skips a collective or is interrupted: all end.

Each rank tells the others ten times a second where it is, through the launcher's store. A rank that
makes no progress for too long, raises, or is told to end raises the alarm; all ranks that live
answer it, print one report of all ranks, and end with status 1. Who does not answer is the cause.
An end that was asked for, by Ctrl-C, say, is one line, and status 128 + the signal.
"""

import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import torch.distributed as dist
from typing_extensions import Self

from torchtitan.distributed.comm import World, collectives_started
from torchtitan.observability.rank_report import ENDED_BY, RankState, Verdict, judge, render

BEAT_SECONDS = 0.1
BEATS_PER_SECOND_OF_ALL = 2000
"""What one store is asked to bear: above 200 ranks, each beats less often."""
ANSWER_SECONDS = 4.0
"""How long the alarm waits for answers: a living rank needs one beat, on a crowded machine more."""
LINGER_SECONDS = 1.5
"""How long a rank stays after its report: the launcher, whose store others still read, ends with it."""
STACK_DEPTH = 20
EXIT_FAILURE = 1
SILENCE = "was sent SIGTERM, and a rank is silent"


class Watchdog:
    """Guards the block it wraps: `with Watchdog(...) as watchdog`, then `mark` what happens when.

    `timeout` is the longest a phase may take, in seconds. One process alone has nobody to watch.
    SIGINT ends all ranks at once, and so does SIGTERM, if `sigterm_ends`. Otherwise that is left to a
    handler that is there already, and only a sign that a rank may have died: torchrun then sends it to
    the others. `farewell` gives what is said of the run where a signal has ended it.
    """

    def __init__(
        self,
        world: World,
        timeout: float,
        dump_folder: str | Path,
        sigterm_ends: bool = True,
        farewell: Callable[[], str] = lambda: "",
    ):
        self._timeout = timeout
        self._place = (0, 0, "start", time.monotonic())
        self._ends_by = (signal.SIGINT, signal.SIGTERM) if sigterm_ends else (signal.SIGINT,)
        self._farewell = farewell
        self._patrol = _Patrol(self, world, Path(dump_folder)) if world.size > 1 else None

    def mark(self, step: int, phase: str) -> None:
        """Say what comes next; costs nothing."""
        self._place = (self._place[0] + 1, step, phase, time.monotonic())

    def set_timeout(self, seconds: float) -> None:
        """Set the longest a phase may take; the present one is given that much from now on."""
        self._timeout = seconds
        self._place = (*self._place[:3], time.monotonic())

    def close(self) -> None:
        if self._patrol is not None:
            self._patrol.finish()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def end(self, headline: str, number: int) -> NoReturn:
        """End this process because a signal has asked for it."""
        words = [headline]
        with suppress(Exception):  # whatever a folder holds: the end must come all the same
            words.append(self._farewell())
        _say(": ".join(filter(None, words)))
        _leave(128 + number)

    def __enter__(self) -> Self:
        if self._patrol is not None:
            self._patrol.start()
        handle = self._end_alone if self._patrol is None else _leave_it_to_the_patrol
        self._handlers = {number: signal.signal(number, handle) for number in self._ends_by}
        os.register_at_fork(after_in_child=_forget_signals)
        return self

    def _end_alone(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends what follows, too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for workers that are killed
        _, step, phase, _ = self._place
        self.end(f"{ENDED_BY[number]} at step {step}, phase {phase}", number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        deliberate = error is None or isinstance(error, KeyboardInterrupt | SystemExit)
        if self._patrol is not None and not deliberate:
            self._patrol.fail(error)
        self.close()


class _Patrol(threading.Thread):
    """The thread behind a Watchdog. It must work while the main thread hangs in a collective."""

    def __init__(self, watchdog: Watchdog, world: World, dump_folder: Path):
        super().__init__(name="watchdog", daemon=True)
        self._watchdog = watchdog
        self._world = world
        self._dump_folder = dump_folder
        self._state = RankState(world.rank, socket.gethostname(), os.getpid(), os.getppid())
        self._beat = max(BEAT_SECONDS, world.size / BEATS_PER_SECOND_OF_ALL)
        self._finished = threading.Event()
        self._signals, self._wakeup = socket.socketpair()
        self._roll_call: tuple[float, list[RankState]] | None = None

    def start(self) -> None:
        # A connection of its own: a store client serves one call at a time, and others wait in theirs.
        self._store = dist.PrefixStore(
            f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
            dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=10),
            ),
        )
        self._tell()
        # torchrun ends the other ranks with SIGTERM when one dies. A handler in Python would run when
        # the main thread leaves its collective, that is never; the wake-up socket is written at once.
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        super().start()

    def fail(self, error: BaseException) -> None:
        """Called by the main thread: hand the exception over and wait for the end of the process."""
        # gloo raises plain RuntimeErrors; its sources' path is all that tells them apart.
        self._state.error_from_peer = isinstance(error, dist.DistError) or "gloo" in str(error)
        self._state.traceback = "".join(traceback.format_exception(error))
        self._state.error = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
        self._wakeup.send(b"\0")
        self.join()

    def finish(self) -> None:
        self._finished.set()
        self._wakeup.send(b"\0")
        self.join()
        signal.set_wakeup_fd(-1)

    def run(self) -> None:
        try:
            while not self._finished.is_set():
                self._tell()
                if self._anything_wrong():
                    self._raise_alarm()
            self._state.finished = True
            self._tell()
        except dist.DistError as error:  # the store is gone, and the launcher that kept it
            self._end([self._state], Verdict((), f"no word from the launcher any more: {error}"))

    def _anything_wrong(self) -> bool:
        """Look around for one beat."""
        state, watchdog = self._state, self._watchdog
        received = b""
        if select.select([self._signals], [], [], self._beat)[0]:
            received = self._signals.recv(64)
        if ends_by := next((number for number in watchdog._ends_by if number in received), 0):
            state.complaint = ENDED_BY[ends_by]
        elif signal.SIGTERM in received:
            self._roll_call = (time.monotonic() + ANSWER_SECONDS, self._read_all())
        elif self._silence_after_roll_call():
            state.complaint = SILENCE
        elif state.error:
            state.complaint = "failed"
        elif time.monotonic() - watchdog._place[3] > watchdog._timeout:
            state.complaint = f"no progress for {watchdog._timeout:g} s"
        return bool(state.complaint) or self._store.check(["alarm"])

    def _silence_after_roll_call(self) -> bool:
        """Whether a rank has not said a word in the seconds since SIGTERM."""
        if self._roll_call is None or time.monotonic() < self._roll_call[0]:
            return False
        told_at = {state.rank: state.told_at for state in self._roll_call[1]}
        self._roll_call = None
        return any(s.told_at == told_at.get(s.rank) and not s.finished for s in self._read_all())

    def _raise_alarm(self) -> None:
        """Tell all, wait for their answers, report, end."""
        self._store.set("alarm", "")
        self._state.heard_alarm = True
        self._tell()
        deadline = time.monotonic() + ANSWER_SECONDS
        states = self._read_all()
        while time.monotonic() < deadline and not all(s.heard_alarm or s.finished for s in states):
            time.sleep(self._beat)
            states = self._read_all()
        self._end(states, judge(states, time.time()))

    def _tell(self) -> None:
        state = self._state
        state.num_marks, state.step, state.phase, since = self._watchdog._place
        state.seconds_in_phase = time.monotonic() - since
        state.told_at = time.time()
        state.collectives = collectives_started()
        state.stack = _main_thread_stack()
        self._store.set(f"rank{state.rank}", state.to_json())

    def _read_all(self) -> list[RankState]:
        keys = [f"rank{rank}" for rank in range(self._world.size)]
        return [RankState.from_json(self._store.get(k)) for k in keys if self._store.check([k])]

    def _end(self, states: list[RankState], verdict: Verdict) -> None:
        if verdict.ended_by:
            self._watchdog.end(verdict.headline, verdict.ended_by)
        report = render(states, verdict, time.time())
        _say(report)
        for leave in (self._leave_with_the_run, self._leave_with_torchrun):
            try:
                leave(verdict.headline, report)
            except OSError as error:  # a full disk, say: the end must come all the same
                _say(f"the report of this failure could not be left: {error}")
        for state in states:
            if state.rank in verdict.odd_ranks and not (state.heard_alarm or state.finished):
                self._kill_sibling(state)
        time.sleep(LINGER_SECONDS)
        _leave(EXIT_FAILURE)

    def _leave_with_the_run(self, headline: str, report: str) -> None:
        self._dump_folder.mkdir(parents=True, exist_ok=True)
        draft = self._dump_folder / f".failure_{self._world.rank}"
        draft.write_text(report + "\n")
        draft.replace(self._dump_folder / "failure.txt")

    def _leave_with_torchrun(self, headline: str, report: str) -> None:
        """Write the headline where torchrun's summary takes it from."""
        if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            extra = {
                "py_callstack": f"{headline} (see {self._dump_folder / 'failure.txt'})",
                "timestamp": str(int(time.time())),
                "report": report,
            }
            Path(error_file).write_text(
                json.dumps({"message": {"message": headline, "extraInfo": extra}})
            )

    def _kill_sibling(self, state: RankState) -> None:
        """End a frozen rank of this launcher, which would else wait 30 s for it."""
        if state.host != self._state.host or state.launcher_pid != self._state.launcher_pid:
            return
        # A process that has ended meanwhile may have left its number to another: the handle has not.
        with suppress(OSError), os.fdopen(os.pidfd_open(state.pid)) as handle:
            if f"PPid:\t{os.getppid()}\n" in Path(f"/proc/{state.pid}/status").read_text():
                signal.pidfd_send_signal(handle.fileno(), signal.SIGKILL)


def _say(text: str) -> None:
    # Not by sys.stderr: the handler of a signal may have interrupted its writing. The disk may be full.
    with suppress(OSError), open(2, "w", errors="backslashreplace", closefd=False) as stderr:
        print(text, file=stderr)


def _leave(status: int) -> NoReturn:
    for worker in multiprocessing.active_children():  # of data loaders: they would see it in seconds
        worker.kill()
    with suppress(OSError, RuntimeError):  # a full disk; interrupted in its writing
        sys.stdout.flush()
    os._exit(status)


def _leave_it_to_the_patrol(number: int, frame: FrameType | None) -> None:
    """The wake-up socket has told it."""


def _main_thread_stack() -> list[str]:
    frame = sys._current_frames().get(threading.main_thread().ident)
    calls = []
    while frame is not None and len(calls) < STACK_DEPTH:
        calls.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return calls[::-1]


def _forget_signals() -> None:
    """A data loader's worker is no rank: it ends by SIGTERM as usual, and at Ctrl-C by its rank.

    Ctrl-C goes to workers, too: one that ended by itself would make torch raise in its rank.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
