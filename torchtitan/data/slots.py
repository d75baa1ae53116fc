"""What does one slot of the global batch read next?"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from torchtitan.data.packing import PackedStream
from torchtitan.ops.cross_entropy import IGNORE_INDEX


class Slot:
    """One row of the global batch. Mixes sources by whole sequences: weights are token ratios."""

    def __init__(
        self, number: int, num_slots: int, streams: Sequence[PackedStream], weights: Sequence[float]
    ):
        self.number, self.streams, self.weights = number, streams, weights
        self.turn = 0  # sequences so far
        # Slots differ in their place in the schedule, so that each batch has the mix as well.
        self._phases = [(number + 0.5) / num_slots]
        self._phases += [number * math.sqrt(k * k + 1) % 1 for k in range(1, len(streams))]

    @property
    def dry(self) -> bool:
        return all(stream.dry for stream in self.streams)

    def fill(self, tokens: np.ndarray, labels: np.ndarray) -> tuple[list[int], bool]:
        """Write the next sequence, padded where data ends: its pieces' lengths, if it has data."""
        lengths: list[int] = []
        while not lengths and not self.dry:
            live = [k for k, stream in enumerate(self.streams) if not stream.dry]
            k = live[_source_of_turn(self.turn, [self.weights[k] for k in live], self._phases)]
            lengths = self.streams[k].fill(tokens, labels)
            self.turn += 1
        written = sum(lengths)
        if written < len(tokens):
            tokens[written:] = 0
            labels[written:] = IGNORE_INDEX
            lengths.append(len(tokens) - written)
        return lengths, written > 0

    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn, "sources": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn = state["turn"]
        for stream, stream_state in zip(self.streams, state["sources"], strict=True):
            stream.load_state_dict(stream_state)


def _source_of_turn(turn: int, weights: Sequence[float], phases: Sequence[float]) -> int:
    """Which source serves a turn: every source stays within two turns of its share.

    The first source takes the turns at which floor(turn * share + phase) steps up, as Bresenham's
    line does; of the turns it leaves, the second takes its share in the same way, and so on. Summed
    over slots with evenly spread phases the first source's counts are exact (Hermite's identity).
    """
    rest = sum(weights)
    for k, (weight, phase) in enumerate(zip(weights[:-1], phases)):
        taken = math.floor(turn * weight / rest + phase)
        if math.floor((turn + 1) * weight / rest + phase) > taken:
            return k
        turn -= taken
        rest -= weight
    return len(weights) - 1
