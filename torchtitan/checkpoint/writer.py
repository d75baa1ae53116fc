"""How a state gets to disk: by all ranks together, now or while training goes on."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

# Private, as of 2.11 and 2.13: the public DefaultStager of 2.11 forgets its buffer and fails the second time.
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.checkpoint import storage
from torchtitan.distributed.comm import new_background_group
from torchtitan.logging import logger

T = TypeVar("T")
State = dict[str, Any]
"""Tensors, plain or DTensor, in nested dicts."""
AsyncMode = Literal["disabled", "async", "async_with_pinned_mem"]


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written or read; those that are there are as they were."""


@dataclass(frozen=True)
class SaveJob:
    """One checkpoint to write."""

    folder: Path
    step: int
    state: State
    manifest: dict[str, Any]
    """What the manifest says beside the files."""
    keep: int
    """Checkpoints to keep with it; 0 is all."""
    export: Callable[[Path], None] | None = None
    """Writes the files into the folder, on all ranks, where they are not to be PyTorch's."""
    started: float = field(default_factory=time.perf_counter)
    """When training began to wait for it."""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def write(self, folder: Path, group: dist.ProcessGroup | None) -> None:
        """Write the files into the folder. Collective."""
        if self.export is not None:
            self.export(folder)
            return
        try:
            dcp.save(self.state, checkpoint_id=folder, process_group=group)
        except CheckpointException as error:  # no Exception, which callers could not expect
            raise CheckpointFailed(first_failure(error)) from error


class CheckpointWriter:
    """Writes one checkpoint at a time; all ranks make one and call it alike.

    Asynchronous modes copy the state to one buffer in host memory, which the next save uses again,
    and a thread writes that; its collectives have a process group of their own.
    """

    def __init__(self, async_mode: AsyncMode):
        self._group: dist.ProcessGroup | None = None
        self._pending: Future[None] | None = None
        if async_mode == "disabled":
            return
        self._group = new_background_group()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pinned = async_mode == "async_with_pinned_mem"
        self._stager = StateDictStager(pin_memory=self._pinned)

    def write(self, job: SaveJob, in_background: bool) -> None:
        """Write and publish a checkpoint; in the background it is finished some time later.

        The state may be changed as soon as this returns. Waits for the save before, and raises
        CheckpointFailed for that one, too.
        """
        self.finish()
        if self._group is None or not in_background:
            _write(job, None)
            return
        staged = replace(job, state=self._stager.stage(job.state, non_blocking=self._pinned))
        if self._pinned:
            torch.accelerator.synchronize()
        self._pending = self._thread.submit(_write, staged, self._group)
        logger.info(
            f"step {job.step} is being saved; training stood still for {job.seconds:.2f} s"
        )

    def raise_failure(self) -> None:
        """Raise CheckpointFailed if a save in the background has failed; does not wait for one."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in the background, if there is one."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's result of `work`; what fails on one rank raises CheckpointFailed on all.

    Its text has each error once, with the ranks that met it unless all did.
    """
    result = error = None
    try:
        result = work()
    except CheckpointFailed as caught:
        error = str(caught)
    except Exception as caught:  # noqa: BLE001 - raised below, on every rank
        error = f"{type(caught).__name__}: {caught}"
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, error), group)
    ranks: dict[str, list[int]] = {}
    for rank, (_, error) in enumerate(outcomes):
        if error:
            ranks.setdefault(error, []).append(rank)
    if ranks:
        told = (
            error if len(met) == len(outcomes) else f"{_named(met)}: {error}"
            for error, met in ranks.items()
        )
        raise CheckpointFailed("; ".join(told))
    return [result for result, _ in outcomes]


def first_failure(error: CheckpointException) -> str:
    """What failed and where, in a few words; the text of `error` has the stacks of all ranks."""
    ranks = sorted(error.failures)
    cause, _ = error.failures[ranks[0]]
    return f"{type(cause).__name__}: {cause}, on {_named(ranks)}"


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    return f"rank {ranks[0]}{more}"


def _write(job: SaveJob, group: dist.ProcessGroup | None) -> None:
    """Write and publish a checkpoint, or leave nothing of it."""
    temporary = storage.temporary_path(job.folder, job.step)
    try:
        _publish(job, temporary, group)
    except CheckpointFailed:  # on all ranks: none is writing any more
        if dist.get_rank(group) == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(job: SaveJob, temporary: Path, group: dist.ProcessGroup | None) -> None:
    """Files of all ranks, then checksums, then the manifest and the name."""
    rank = dist.get_rank(group)

    def prepare() -> None:
        if rank == 0:
            storage.remove_leftovers(job.folder)
            storage.new_folder(temporary)
            for path in storage.set_aside_newer(job.folder, job.step):
                logger.warning(f"{path} is of a run that this one went back behind")

    def fingerprints() -> dict[str, Any]:
        share = [temporary / name for name in names[rank :: dist.get_world_size(group)]]
        for path in share:
            storage.flush(path)
        return {path.name: storage.fingerprint(path) for path in share}

    def publish() -> None:
        if rank == 0:
            final = storage.publish(temporary, {**job.manifest, "files": files})
            storage.remove_leftovers(job.folder)
            storage.remove_old(job.folder, job.keep, final)

    on_all_ranks(prepare, group)
    on_all_ranks(lambda: job.write(temporary, group), group)
    # On a network's disk, a file is seen for sure by the rank that has written it.
    seen = on_all_ranks(lambda: [path.name for path in temporary.iterdir()], group)
    names = sorted({name for part in seen for name in part})
    parts = on_all_ranks(fingerprints, group)
    files = {name: entry for part in parts for name, entry in part.items()}
    on_all_ranks(publish, group)
    size, seconds = storage.total_bytes(files.values()) / 2**20, job.seconds
    logger.info(
        f"saved {' and '.join(job.state)} to {job.folder / f'step-{job.step}'}: {size:,.1f} MiB in "
        f"{seconds:.2f} s, {size / seconds:,.0f} MiB/s"
    )
