"""How a function runs on several CPU ranks of this machine: tests, verify and benchmarks.

Ranks are forked fresh for each call from one warm server (launch_preload.py), so that a call starts
in a fraction of a second and nothing is carried from one to the next: neither process groups nor
DTensor's caches, which outlive a group and answer for an equal mesh of the next one.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS_TO_DUMP_STACKS = 0.5


class RankFailure(RuntimeError):
    """A rank raised, died or ran out of time; the message holds what every rank has to tell."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Call `fn(*args)` on `world_size` gloo ranks and return their results, by rank.

    `fn` is a module-level function. It runs inside an initialised process group, with RANK,
    WORLD_SIZE and LOCAL_RANK set and the caller's environment. Arguments and results are pickled.
    The first rank that raises or dies ends the call at once, `timeout` (seconds) ends it anyway:
    every rank is killed, and RankFailure tells where each of them was.
    """
    with tempfile.TemporaryDirectory(prefix="torchtitan_ranks_") as folder:
        call = pickle.dumps((fn, args))
        ranks = [
            _Rank(_Assignment(rank, world_size, Path(folder), call, timeout, dict(os.environ)))
            for rank in range(world_size)
        ]
        try:
            _wait_for(ranks, time.monotonic() + timeout, timeout)
        finally:
            for rank in ranks:
                rank.end()
        return [pickle.loads(rank.result) for rank in ranks]


@dataclass(frozen=True)
class _Assignment:
    """What one rank is given."""

    rank: int
    world_size: int
    folder: Path
    call: bytes
    timeout: float
    environment: dict[str, str]

    @property
    def stack_file(self) -> Path:
        return self.folder / f"stack_{self.rank}"


class _Rank:
    """The parent's end of one rank: its process, its pipe, and what came through it."""

    def __init__(self, assignment: _Assignment):
        self.rank = assignment.rank
        self.stack_file = assignment.stack_file
        self.stack_file.touch()
        self.result: bytes | None = None
        self.traceback: str | None = None
        self.failed_at = float("-inf")  # a rank that died without a word comes first
        self.pipe, child_pipe = _context().Pipe(duplex=False)
        # Not daemonic: a rank may have children of its own, such as data loader workers.
        self.process = _context().Process(target=_rank_main, args=(assignment, child_pipe))
        self.process.start()
        child_pipe.close()

    @property
    def failed(self) -> bool:
        return self.traceback is not None or (self.result is None and not self.process.is_alive())

    def receive(self) -> None:
        """Take what the rank sent; a rank that died without a word closes its pipe."""
        try:
            succeeded, content, when = self.pipe.recv()
        except EOFError:
            self.process.join()
            return
        if succeeded:
            self.result = content
        else:
            self.traceback, self.failed_at = content, when

    def story(self) -> str:
        """What the rank has to tell after a failure, its own words first."""
        if self.result is not None:
            return f"rank {self.rank} finished"
        if self.traceback is not None:
            return f"rank {self.rank} raised\n{self.traceback}"
        stack = "\n".join(
            line
            for line in self.stack_file.read_text().splitlines()
            if "/multiprocessing/" not in line and '"<string>"' not in line
        )
        code = self.process.exitcode
        if code is None:
            return f"rank {self.rank} was still running\n{stack}"
        signalled = code < 0
        how = f"was ended by {signal.Signals(-code).name}" if signalled else f"exited with {code}"
        return f"rank {self.rank} {how}\n{stack}"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def _wait_for(ranks: list[_Rank], deadline: float, timeout: float) -> None:
    waiting = {rank.pipe: rank for rank in ranks}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(f"no end after {timeout:g} s\n{_stories(ranks)}")
        for pipe in ready:
            rank = waiting.pop(pipe)
            rank.receive()
            if rank.failed:
                raise RankFailure(_stories(ranks))
    for rank in ranks:  # a rank can still crash or hang while it exits
        rank.process.join(max(0.0, deadline - time.monotonic()))
        if rank.process.exitcode != 0:
            raise RankFailure(
                f"rank {rank.rank} returned, then ended with status {rank.process.exitcode}"
            )


def _stories(ranks: list[_Rank]) -> str:
    """What every rank has to tell, the first to fail on top; ranks still running say where they are."""
    silent = [rank for rank in ranks if rank.result is None and rank.traceback is None]
    for rank in silent:
        if rank.process.is_alive():
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(SECONDS_TO_DUMP_STACKS)
    for rank in silent:
        if rank.pipe.poll():
            rank.receive()
    order = sorted(ranks, key=lambda rank: rank.failed_at if rank.failed else float("inf"))
    return "\n".join(rank.story() for rank in order)


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchtitan.distributed.launch_preload"])
    return context


def _rank_main(assignment: _Assignment, pipe: Connection) -> None:
    # The server's environment is the one of its own start; tests change theirs. Threads stay at one.
    os.environ.clear()
    os.environ.update(
        assignment.environment,
        RANK=str(assignment.rank),
        LOCAL_RANK=str(assignment.rank),
        WORLD_SIZE=str(assignment.world_size),
        LOCAL_WORLD_SIZE=str(assignment.world_size),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    # The server's thread pool is not in its forks. Torch makes another where it is asked for first, and aborts
    # where two threads of autograd ask at once (seen on 2.11, in dry runs of pipelines).
    torch.set_num_threads(1)
    with open(assignment.stack_file, "w") as stacks:
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks)
        try:
            fn, args = pickle.loads(assignment.call)
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(assignment.folder / "store"), assignment.world_size),
                rank=assignment.rank,
                world_size=assignment.world_size,
                timeout=timedelta(seconds=2 * assignment.timeout),  # the parent's clock decides
            )
            result = pickle.dumps(fn(*args))
            if dist.is_initialized():  # else `fn` has left it by itself
                # A rank that closes its connections early breaks the last collective of a slower one.
                dist.barrier()
                dist.destroy_process_group()
            pipe.send((True, result, time.monotonic()))
        except BaseException:  # noqa: BLE001 - reported and raised by the parent
            pipe.send((False, traceback.format_exc(), time.monotonic()))
            raise SystemExit(1) from None
        finally:
            faulthandler.disable()
            faulthandler.unregister(signal.SIGUSR1)
