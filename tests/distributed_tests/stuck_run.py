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

TIMEOUT_SECONDS = 4
PHASE_SECONDS = 0.3
BAD_STEP = 3


def main(dump_folder: str, bad_rank: int, misdeed: str) -> None:
    world = comm.World.from_environment()
    comm.init_process_group(
        Comm(train_timeout_seconds=TIMEOUT_SECONDS), dump_folder, torch.device("cpu")
    )
    with Watchdog(world, 30, dump_folder) as watchdog:
        for step in range(1, 6):
            watchdog.mark(step, "backward")
            time.sleep(PHASE_SECONDS)
            if (world.rank, step) == (bad_rank, BAD_STEP):
                Path(dump_folder, "misdeed_at").write_text(str(time.time()))
                misbehave(misdeed)
            if not (misdeed == "skip" and (world.rank, step) == (bad_rank, BAD_STEP)):
                dist.all_reduce(torch.ones(1))
            watchdog.mark(step, "optimizer")
            if step == 1:
                comm.set_timeout(TIMEOUT_SECONDS)
                watchdog.set_timeout(TIMEOUT_SECONDS)
        comm.destroy_process_group()


def misbehave(misdeed: str) -> None:
    match misdeed:
        case "kill":
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
