"""torchrun with a check before it and one clear message after it: where run_train.sh ends.

`python -m torchtitan.launcher [torchrun's options] -m torchtitan.train [configuration]`
"""

import glob
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

if __name__ == "__main__":  # what is imported now takes seconds: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from torchtitan import preflight, train
from torchtitan.config.faults import EXIT_CONFIG
from torchtitan.preemption import EXIT_START_AGAIN, STOP_SIGNALS

TRAIN_MODULE = "torchtitan.train"
NAME_PATIENCE = 15.0
"""Seconds that the name of the meeting place may take to be known: clusters start machines one by one."""
LAST_LINES = 30


def main(argv: Sequence[str]) -> int:
    """Launch the ranks of this machine; returns the exit status, that of the first rank to fail."""
    args = parse_args(argv)
    if args.training_script == TRAIN_MODULE:
        if preflight.is_dry_run(args.training_script_args):
            return train.main(args.training_script_args)
        status = _checked(args.training_script_args)
        if status != 0:
            return status
    several = parse_min_max_nnodes(args.nnodes)[1] > 1  # torchrun's default is "1:1"
    if several and args.rdzv_endpoint and not _finds(args.rdzv_endpoint, args.nnodes):
        return EXIT_CONFIG
    own_log_dir = None if args.log_dir else tempfile.mkdtemp(prefix="torchtitan_logs_")
    args.log_dir = args.log_dir or own_log_dir
    if sys.stderr.isatty():
        os.environ.setdefault("FORCE_COLOR", "1")  # ranks write to pipes
    # torchrun would kill ranks that still save 30 s after it has passed a signal on.
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    told: list[int] = []
    _pass_on_signals(told)
    _mute_torchrun()
    _end_when_saved()
    _end_when_interrupted_again()
    try:
        run(args)
    except ChildFailedError as error:
        status = _status(error, told)
        if status != EXIT_START_AGAIN:
            _tell(error, args.log_dir, args.local_ranks_filter)
            return status
    except SignalException as error:
        return 128 + int(error.sigval)
    else:
        status = 0
    if own_log_dir:
        shutil.rmtree(own_log_dir)
    return status


def _checked(argv: Sequence[str]) -> int:
    """The preflight's exit status. In a process that ends: what it takes of a GPU would stay taken."""
    check = multiprocessing.get_context("fork").Process(target=_exit_as_checked, args=(argv,))
    check.start()
    check.join()
    return check.exitcode


def _exit_as_checked(argv: Sequence[str]) -> None:
    sys.exit(preflight.main(argv))


def _finds(endpoint: str, nnodes: str) -> bool:
    """Say where so many machines meet, and whether that one is known here: torchrun would try for minutes."""
    host, _ = parse_rendezvous_endpoint(endpoint, default_port=-1)
    deadline = time.monotonic() + NAME_PATIENCE
    while reason := _why_unknown(host):
        if time.monotonic() > deadline:
            print(f"{endpoint}, where {nnodes} machines are to meet: {reason}.", file=sys.stderr)
            return False
        time.sleep(1.0)
    print(f"{nnodes} machines meet at {endpoint}", file=sys.stderr)
    return True


def _why_unknown(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return error.strerror
    return ""


def _end_when_saved() -> None:
    """Let torchrun start no rank again (PET_MAX_RESTARTS) where one has saved and ended on request."""
    # Private as of torch 2.13; there is no public way to choose by exit status.
    watch = LocalElasticAgent._monitor_workers

    def watch_and_choose(self: LocalElasticAgent, ranks: WorkerGroup) -> RunResult:
        result = watch(self, ranks)
        if EXIT_START_AGAIN in (failure.exitcode for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    LocalElasticAgent._monitor_workers = watch_and_choose


def _end_when_interrupted_again() -> None:
    """Let Ctrl-C end all at once where torchrun waits for the ranks that it has told to end."""
    # Private as of torch 2.13; its own handler of a second signal would make it wait once more.
    end_ranks = LocalElasticAgent._shutdown

    def end(number: int, frame: FrameType | None) -> None:
        for rank in _children():
            with suppress(ProcessLookupError):  # ended meanwhile
                os.killpg(rank, signal.SIGKILL)
        os._exit(128 + number)

    def end_ranks_or_end(self: LocalElasticAgent, *args, **options) -> None:
        signal.signal(signal.SIGINT, end)
        end_ranks(self, *args, **options)

    LocalElasticAgent._shutdown = end_ranks_or_end


def _mute_torchrun() -> None:
    """Hide its warnings of each process that it sends a signal to, unless LOGLEVEL asks for them."""
    if "LOGLEVEL" not in os.environ:
        for module in ("agent.server.api", "multiprocessing.api"):
            logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.ERROR)


def _pass_on_signals(told: list[int]) -> None:
    """Hand stop signals on to the ranks, which save and end in their own time; `told` keeps them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if not _hand_on(number):  # ranks have not started, or have ended, which torchrun will see
            threading.Thread(target=_hand_on_later, args=(number,), daemon=True).start()

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)


def _hand_on(number: int) -> bool:
    """Send a signal to the ranks; whether there were any."""
    ranks = _children()
    for rank in ranks:
        os.kill(rank, number)
    return bool(ranks)


def _hand_on_later(number: int) -> None:
    while not _hand_on(number):
        time.sleep(0.1)


def _children() -> list[int]:
    """Process ids of the ranks on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.append(int(path.parent.name))
    return found


def _status(error: ChildFailedError, told: list[int]) -> int:
    """Of a rank that has saved on request; else of the first to fail.

    torchrun may have ended the other ranks of a saved run with SIGTERM.
    """
    statuses = [failure.exitcode for failure in error.failures.values()]
    if EXIT_START_AGAIN in statuses:
        return EXIT_START_AGAIN
    first = error.get_first_failure()[1].exitcode
    if -first in told:
        return 128 - first
    return first if first > 0 else 1


def _tell(error: ChildFailedError, log_dir: str, local_ranks_shown: str) -> None:
    """Say what ended the run, and show it where the rank that knows it is one that is not shown."""
    shown = {int(rank) for rank in local_ranks_shown.split(",") if rank}
    failures = error.failures
    reports = {f.local_rank: _report(f) for f in failures.values() if _report(f)}
    first_rank, first = error.get_first_failure()
    if not reports and first.local_rank not in shown:
        print(_last_words(first, log_dir), file=sys.stderr)
    if reports and not shown & reports.keys():
        print(next(iter(reports.values())), file=sys.stderr)
    print(
        f"rank {first_rank} was first to end: {_how(first)}. Output of all ranks: {log_dir}",
        file=sys.stderr,
    )


def _report(failure: ProcessFailure) -> str:
    """The watchdog's report, which it leaves in the rank's error file."""
    message = failure.error_file_data.get("message")
    return message["extraInfo"].get("report", "") if isinstance(message, dict) else ""


def _last_words(failure: ProcessFailure, log_dir: str) -> str:
    pattern = os.path.join(log_dir, "*", "attempt_*", str(failure.local_rank), "stderr.log")
    paths = sorted(glob.glob(pattern), key=os.path.getmtime)  # of restarts, or of earlier runs
    if not paths:
        return ""
    with open(paths[-1]) as file:
        return "".join(deque(file, LAST_LINES))


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return signal.Signals(-failure.exitcode).name
    return f"exit status {failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
