"""How do batches reach the training loop, whichever processes prepare them?"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.data.batch import Batch
from torchtitan.data.datasets import open_sources, parse_dataset
from torchtitan.data.packing import PackedStream, SkipReport
from torchtitan.data.slots import Slot
from torchtitan.data.source import Dealing
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.ops.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut: the same on every rank."""

    dataset: str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
    num_slots: int
    """Sequences of a global batch."""
    seq_len: int
    seed: int
    dataset_path: str | None = None
    repeat: bool = True
    shuffle: bool = True
    num_workers: int = 0
    persistent_workers: bool = False
    pin_memory: bool = False
    prefetch_factor: int | None = None
    section: str = "training"
    """Section of the job config the settings are from, for messages."""


def build_loader(config: DataConfig, tokenizer: Tokenizer, slots: range) -> "Loader":
    """A loader of the slots that this rank serves; ConfigError where the data cannot be used."""
    assert 0 <= slots.start < slots.stop <= config.num_slots, f"slots {slots} of {config.num_slots}"
    return Loader(config, _SlotStream(config, tokenizer, slots))


def position_faults(
    states: Mapping[str, Any], num_slots: int, num_sources: int, section: str
) -> list[Fault]:
    """Why data cannot be read on from the places of a checkpoint, `states` being those of all slots."""
    if set(states) != set(map(str, range(num_slots))):
        reason = f"the checkpoint holds the places of {len(states)} sequences of a global batch."
        remedy = f"Resume with {section}.global_batch_size = {len(states)}."
        return [Fault(f"{section}.global_batch_size", reason, remedy, num_slots)]
    saved = len(states["0"]["sources"])
    if saved != num_sources:
        reason = f"names {num_sources} sources, the checkpoint was made with {saved}."
        remedy = "Resume with the same sources in the same order."
        return [Fault(f"{section}.dataset", reason, remedy)]
    return []


class Loader:
    """Batches without end; after the data (repeat = false) they are empty and `exhausted`."""

    def __init__(self, config: DataConfig, stream: "_SlotStream"):
        self._stream = stream
        self._num_workers = min(config.num_workers, len(stream.slots))
        self._pin_memory = config.pin_memory and torch.cuda.is_available()
        self._loader = DataLoader(
            stream,
            batch_size=None,  # rows come as the workers make them, in turn
            collate_fn=_as_they_are,
            num_workers=self._num_workers,
            persistent_workers=config.persistent_workers,
            prefetch_factor=config.prefetch_factor,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # the default would draw from the global one
        )
        self._iterator: Iterator[_Rows] | None = None
        self._ahead: tuple[Batch, dict[int, Any]] | None = None  # the next batch, and the places after it
        self._states = stream.states

    def __iter__(self) -> "Loader":
        return self

    def prefetch(self) -> None:
        """Prepare the next batch while the device has other work; it counts once handed out."""
        if self._iterator is None:  # not before: workers start from the state loaded by now
            self._iterator = iter(self._loader)
        if self._ahead is None:
            parts = [next(self._iterator) for _ in range(max(1, self._num_workers))]
            states = {slot: state for part in parts for slot, state in part.states.items()}
            self._ahead = self._joined(parts), states

    def __next__(self) -> Batch:
        self.prefetch()
        (batch, self._states), self._ahead = self._ahead, None
        return batch

    def restart(self) -> None:
        """Go back to where the loader began: the start of the data, or the state loaded."""
        self._iterator, self._ahead = None, None
        self._states = self._stream.states

    def state_dict(self) -> dict[str, Any]:
        """The places of this rank's slots after the batch handed out last, by slot; plain JSON."""
        return {str(slot): self._states[slot] for slot in self._stream.slots}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on where a run with as many slots stopped; `states` are those of all slots."""
        assert self._iterator is None, "load the state before the first batch: workers read ahead"
        self._stream.load(states)
        self._states = self._stream.states

    @property
    def num_skipped_documents(self) -> int:
        """Bad documents that this rank's slots have met so far."""
        return sum(
            source["skipped"] for state in self._states.values() for source in state["sources"]
        )

    def _joined(self, parts: "Sequence[_Rows]") -> Batch:
        num_rows, seq_len = len(self._stream.slots), self._stream.seq_len
        tokens, labels = torch.empty(
            2, num_rows, seq_len, dtype=torch.int64, pin_memory=self._pin_memory
        )
        lengths: list[list[int]] = [[]] * num_rows
        for worker, part in enumerate(parts):
            # By NumPy: torch would wake many threads for it, which takes longer, milliseconds at times.
            tokens.numpy()[worker :: len(parts)] = part.tokens
            labels.numpy()[worker :: len(parts)] = part.labels
            lengths[worker :: len(parts)] = part.document_lengths
        return Batch(
            tokens=tokens,
            labels=labels,
            document_lengths=lengths,
            num_valid_tokens=sum(part.num_valid_tokens for part in parts),
            exhausted=all(part.exhausted for part in parts),
        )


@dataclass(frozen=True)
class _Rows:
    """One worker's rows of one batch, and where its slots stand after them."""

    tokens: np.ndarray  # (rows, L) int32
    labels: np.ndarray  # (rows, L) int32
    document_lengths: list[list[int]]
    num_valid_tokens: int
    exhausted: bool
    states: dict[int, Any]


class _SlotStream(IterableDataset):
    """The rows of some slots, batch after batch; worker w of W makes rows w, w + W, ..."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, slots: range):
        specs = parse_dataset(config.dataset, config.dataset_path, config.section)
        dealing = Dealing(config.num_slots, config.seed, config.shuffle)
        self.sources = open_sources(specs, dealing, config.section, config.dataset_path)
        self.reports = [SkipReport(source.name) for source in self.sources]
        self.weights = [spec.weight for spec in specs]
        self.tokenizer, self.slots, self.seq_len = tokenizer, slots, config.seq_len
        self.num_slots, self.repeat, self.section = config.num_slots, config.repeat, config.section
        self.states = {slot.number: slot.state_dict() for slot in self._build(slots)}

    def load(self, states: Mapping[str, Any]) -> None:
        faults = position_faults(states, self.num_slots, len(self.sources), self.section)
        if faults:
            raise ConfigError(faults)
        self.states = {slot: states[str(slot)] for slot in self.slots}

    def __iter__(self) -> Iterator[_Rows]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        slots = self._build(self.slots[first::step])
        for slot in slots:
            slot.load_state_dict(self.states[slot.number])
        while True:
            yield self._rows(slots)

    def _build(self, numbers: range) -> list[Slot]:
        return [
            Slot(
                number,
                self.num_slots,
                [
                    PackedStream(source, number, self.tokenizer, self.repeat, report)
                    for source, report in zip(self.sources, self.reports)
                ],
                self.weights,
            )
            for number in numbers
        ]

    def _rows(self, slots: list[Slot]) -> _Rows:
        tokens, labels = np.empty((2, len(slots), self.seq_len), dtype=np.int32)
        written = [slot.fill(*row) for slot, row in zip(slots, zip(tokens, labels))]
        return _Rows(
            tokens=tokens,
            labels=labels,
            document_lengths=[lengths for lengths, _ in written],
            num_valid_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
            exhausted=not any(has_data for _, has_data in written),
            states={slot.number: slot.state_dict() for slot in slots},
        )


def _as_they_are(rows: _Rows) -> _Rows:
    return rows


def _outlive_signals(worker: int) -> None:
    """Leave it to the trainer what a signal means; workers end when it closes them, or dies.

    A process group of their own keeps them from torchrun's and the terminal's signals. SIGTERM they
    obey if it comes from the trainer, because that is how multiprocessing ends them at exit.
    """
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
