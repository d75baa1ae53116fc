"""A training loop in small for test_watchdog.py, started by torchrun: one rank misbehaves at step 3."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan.config.schema import Comm
from torchtitan.distributed import comm
from torchtitan.observability.watchdog import Watchdog
from torchtitan.preemption import StopRequest

TIMEOUT_SECONDS = 4
PHASE_SECONDS = 0.3
BAD_STEP = 3


def main(dump_folder: str, bad_rank: int, misdeed: str) -> None:
    world = comm.World.from_environment()
    comm.init_process_group(
        Comm(train_timeout_seconds=TIMEOUT_SECONDS), dump_folder, torch.device("cpu")
    )
    apart = misdeed == "kill_apart"  # the others do not wait for it, and SIGTERM is a request to save
    if apart:
        StopRequest().listen()
    with Watchdog(world, 30, dump_folder, sigterm_ends=not apart) as watchdog:
        for step in range(1, 6):
            watchdog.mark(step, "backward")
            time.sleep(PHASE_SECONDS)
            if (world.rank, step) == (bad_rank, BAD_STEP):
                Path(dump_folder, "misdeed_at").write_text(str(time.time()))
                misbehave(misdeed)
            if step == BAD_STEP and apart:
                time.sleep(600)
            if not (misdeed == "skip" and (world.rank, step) == (bad_rank, BAD_STEP)):
                dist.all_reduce(torch.ones(1))
            watchdog.mark(step, "optimizer")
            if step == 1 and not apart:
                comm.set_timeout(TIMEOUT_SECONDS)
                watchdog.set_timeout(TIMEOUT_SECONDS)
        comm.destroy_process_group()


def misbehave(misdeed: str) -> None:
    match misdeed:
        case "kill" | "kill_apart":
            os.kill(os.getpid(), signal.SIGKILL)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise ValueError("a bad batch")
        case "sleep":
            time.sleep(600)
        case "terminate_all":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
