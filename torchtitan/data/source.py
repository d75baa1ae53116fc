"""What is a source of documents, and how are its documents dealt to slots?"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

Document: TypeAlias = str | np.ndarray
"""Text to tokenize, or the tokens themselves (pre-tokenized sources)."""


class BadDocument(Exception):
    """A document that cannot be used; it is reported, counted and skipped."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}")


class DataError(RuntimeError):
    """Data that turns out unusable in the middle of a run."""


@dataclass(frozen=True)
class Dealing:
    """Who reads what: all that the order of documents depends on besides the source itself."""

    num_slots: int
    seed: int
    shuffle: bool


class Source(Protocol):
    """Documents, a pure function of slot, epoch and a counter: no state to save, none to lose."""

    name: str

    def read(self, slot: int, epoch: int, index: int) -> Document | None:
        """The slot's document number `index` of this epoch; None when the epoch has no more for it.

        Raises BadDocument for one that cannot be used.
        """
