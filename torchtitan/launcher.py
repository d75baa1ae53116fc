"""torchrun with a check before it and one clear message after it: where run_train.sh ends.

`python -m torchtitan.launcher [torchrun's options] -m torchtitan.train [configuration]`
"""

import glob
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from torchtitan import preflight

TRAIN_MODULE = "torchtitan.train"
LAST_LINES = 30


def main(argv: Sequence[str]) -> int:
    """Launch the ranks of this machine; returns the exit status, that of the first rank to fail."""
    args = parse_args(argv)
    if args.training_script == TRAIN_MODULE:
        status = preflight.main(args.training_script_args)
        if status != 0:
            return status
    args.log_dir = args.log_dir or tempfile.mkdtemp(prefix="torchtitan_logs_")
    try:
        run(args)
    except ChildFailedError as error:
        _tell(error, args.log_dir, args.local_ranks_filter)
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    shutil.rmtree(args.log_dir)
    return 0


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
    [path] = glob.glob(
        os.path.join(log_dir, "*", "attempt_*", str(failure.local_rank), "stderr.log")
    )
    with open(path) as file:
        return "".join(deque(file, LAST_LINES))


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return signal.Signals(-failure.exitcode).name
    return f"exit status {failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
