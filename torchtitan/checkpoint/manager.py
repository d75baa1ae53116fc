"""When a checkpoint is saved, and what is in it.

A checkpoint is a folder step-N (see storage.py): the weights and optimizer moments in logical,
layout-free form by torch.distributed.checkpoint, and a manifest with the run's progress: step, tokens,
seed, batch size, data position.
"""

import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.checkpoint import storage
from torchtitan.checkpoint.find import Progress, is_own, own_folder
from torchtitan.checkpoint.fit import saved_tensors, takes_optimizer
from torchtitan.checkpoint.hf_run import HuggingFace, is_hugging_face
from torchtitan.checkpoint.storage import MODEL
from torchtitan.checkpoint.writer import (
    CheckpointFailed,
    CheckpointWriter,
    SaveJob,
    State,
    first_failure,
    on_all_ranks,
)
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.local_parts import local_part
from torchtitan.logging import logger

Tensors = Mapping[str, torch.Tensor]


class NonFiniteState(RuntimeError):
    """The state to be saved has values that are not finite, and so is not saved."""


class CheckpointManager:
    """Saves and loads one run's model and optimizer state (tensors by name, loaded in place).

    `model_state` gives the tensors that this rank has a part in, under the names of the whole model;
    `optimizer_state` those of each trainable parameter. Entries of the latter may be copies, made when
    they are asked for: what was loaded is set again. `origin`, JSON-able, says where checkpoints come
    from: layout and config.
    """

    def __init__(
        self,
        config: Checkpoint,
        dump_folder: Path,
        model_state: Callable[[], Tensors],
        optimizer_state: MutableMapping[str, Tensors],
        hf: HuggingFace | None = None,
        origin: Mapping[str, Any] | None = None,
    ):
        self.config = config
        self.folder = own_folder(config, dump_folder)
        self.model_state = model_state
        self.optimizer_state = optimizer_state
        self.hf = hf
        self.origin = {"torch": torch.__version__, **(origin or {})}
        self.writer = CheckpointWriter(config.async_mode if self.saves else "disabled")

    @property
    def saves(self) -> bool:
        return self.config.enable and not self.config.load_only

    def load(self, checkpoint: Path) -> None:
        """Read weights, and optimizer state unless it is excluded, in any layout. Collective.

        Raises CheckpointFailed where the checkpoint has other tensors than the model.
        """
        start = time.perf_counter()
        own = is_own(checkpoint, self.folder)
        if is_hugging_face(checkpoint):
            quantized = not own and self.config.initial_load_in_hf_quantized
            on_all_ranks(lambda: self.hf.load(checkpoint, self.model_state(), quantized))
            return
        weights_only = not takes_optimizer(checkpoint, self.config, own)
        state: State = {"model": self.model_state()}
        if not weights_only:
            state["optimizer"] = dict(self.optimizer_state)
        if missing := _missing(state, checkpoint):
            # Balance biases and loads are state of training: with new training they may begin anew.
            anew = {MODEL + name for name in state["model"] if name not in self.optimizer_state}
            if not weights_only or not missing <= anew:
                raise CheckpointFailed(f"{checkpoint} has no {', '.join(sorted(missing))}")
            logger.info(f"not in {checkpoint}, so they begin anew: {', '.join(sorted(missing))}")
            state["model"] = {n: t for n, t in state["model"].items() if MODEL + n not in missing}
        try:
            dcp.load(state, checkpoint_id=checkpoint)
        except CheckpointException as error:  # no Exception, which callers could not expect
            why = first_failure(error)
            raise CheckpointFailed(f"{checkpoint} does not fit this model: {why}") from error
        self.optimizer_state.update(state.get("optimizer", {}))
        seconds = time.perf_counter() - start
        logger.info(f"loaded {' and '.join(state)} from {checkpoint} in {seconds:.2f} s")

    def wants_save(self, step: int, last: bool) -> bool:
        """Whether the run saves after `step`."""
        if not self.saves:
            return False
        first = step == 1 and self.config.enable_first_step_checkpoint
        return last or first or step % self.config.interval == 0

    def save(self, step: int, progress: Progress, last: bool = False, wait: bool = False) -> None:
        """Save step-`step`; on the last step maybe the weights alone. Collective.

        Asynchronous modes return when the state is copied, except for the last save or with `wait`.
        Raises NonFiniteState, or CheckpointFailed, also for a save in the background before this one.
        """
        model_only = last and self.config.last_save_model_only
        dtype = getattr(torch, self.config.export_dtype)
        weights = self.model_state()
        if last and self.config.last_save_in_hf:
            job = self._job(step, {"model": weights}, progress, model_only=True)
            job = replace(job, export=lambda folder: self.hf.save(folder, weights, dtype))
        elif model_only:
            # Buffers keep theirs: a balance bias is a sum of small steps.
            weights = {n: t.to(dtype) if n in self.optimizer_state else t for n, t in weights.items()}
            job = self._job(step, {"model": weights}, progress, model_only=True)
        else:
            state = {"model": weights, "optimizer": dict(self.optimizer_state)}
            job = self._job(step, state, progress, model_only=False)
        _refuse_nonfinite(job)
        self.writer.write(job, in_background=not (wait or last))

    def save_seed(self, progress: Progress) -> None:
        """Save the initial weights as step-0. Collective."""
        job = self._job(0, {"model": self.model_state()}, progress, model_only=True)
        self.writer.write(job, in_background=False)

    def _job(self, step: int, state: State, progress: Progress, model_only: bool) -> SaveJob:
        progress = progress | {"step": step, "model_only": model_only}
        manifest = {"progress": progress, "origin": self.origin}
        return SaveJob(self.folder, step, state, manifest, self.config.keep_latest_k)


def find_altered(checkpoint: Path | None) -> str:
    """What differs from a checkpoint's checksums; empty if nothing does. Collective.

    Every file is read in full by one of the ranks. Raises RuntimeError where the ranks do not see the
    same checkpoint.
    """
    names = on_all_ranks(lambda: checkpoint and str(checkpoint))
    if len(set(names)) > 1:
        raise RuntimeError(f"the ranks see different checkpoints: {sorted(set(map(str, names)))}")
    if checkpoint is None or not storage.has_manifest(checkpoint):  # others' folders have none
        return ""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts = on_all_ranks(lambda: storage.altered_files(checkpoint, rank, world_size))
    altered = sorted(name for part in parts for name in part)
    return f"{', '.join(altered)} does not match its checksum" if altered else ""


def _missing(state: State, checkpoint: Path) -> set[str]:
    """Tensors of a state, by their names in checkpoints, that this one does not have."""
    return {name for name, _ in _flattened(state)} - saved_tensors(checkpoint).keys()


@torch.no_grad()
def _refuse_nonfinite(job: SaveJob) -> None:
    """Raise NonFiniteState on all ranks where a value on any of them is not finite."""
    names, finite = [], []
    for name, tensor in _flattened(job.state):
        local = local_part(tensor)
        if local.is_floating_point() and local.numel():
            names.append(name)
            finite.append(torch.stack(local.aminmax()).isfinite().all())  # one pass, no copy
    flags = [flag.to(finite[0].device) for flag in finite]  # so that the device is waited for once
    passed = torch.stack(flags).tolist() if flags else []
    bad = [name for name, ok in zip(names, passed, strict=True) if not ok]
    if found := sorted({name for part in on_all_ranks(lambda: bad[:3]) for name in part}):
        raise NonFiniteState(f"step {job.step} is not saved: {', '.join(found)} not finite")


def _flattened(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
