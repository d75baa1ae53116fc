"""A pipeline schedule in a file, as torch writes and reads them: a line a rank, an action a field.

2F0 is stage 2's forward of microbatch 0; B is backward, or I and W its halves for inputs and weights;
(0F4;3B1)OVERLAP_F_B is two at once; an empty field waits.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

Action = tuple[int, str, int]
"""Stage, kind and microbatch."""


def read_csv(path: str) -> "CsvSchedule":
    """What a file holds; what is wrong with it, `problems` says."""
    try:
        with open(path, newline="") as file:
            rows = [[action for field in row for action in _actions(field)] for row in csv.reader(file)]
    except (OSError, ValueError) as error:
        return CsvSchedule(path, (), str(error))
    return CsvSchedule(path, tuple(map(tuple, rows)))


def _actions(field: str) -> Iterator[Action]:
    overlapped = re.fullmatch(r"\((.*)\)OVERLAP_F_B", field.strip())
    for text in overlapped[1].split(";") if overlapped else [field.strip()]:
        if not text:
            continue
        found = re.fullmatch(r"(\d+)([FBIW])(\d+)", text)
        if found is None:
            raise ValueError(f"{text!r} is no action such as 2F0 or 0B3")
        yield int(found[1]), found[2], int(found[3])


@dataclass(frozen=True)
class CsvSchedule:
    """The actions of each rank, in order."""

    path: str
    rows: tuple[tuple[Action, ...], ...]
    unreadable: str = ""

    @cached_property
    def num_stages(self) -> int:
        return 1 + max((stage for row in self.rows for stage, _, _ in row), default=-1)

    @cached_property
    def num_microbatches(self) -> int:
        return 1 + max((microbatch for row in self.rows for _, _, microbatch in row), default=-1)

    @property
    def splits_backward(self) -> bool:
        return any(kind == "I" for row in self.rows for _, kind, _ in row)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each stage."""
        owner = {stage: rank for rank, row in enumerate(self.rows) for stage, _, _ in row}
        return tuple(owner[stage] for stage in range(self.num_stages))

    def problems(self, num_ranks: int) -> Iterator[str]:
        """Why the schedule cannot run on so many ranks; nothing where it can."""
        if self.unreadable:
            yield f"{self.unreadable}."
            return
        if len(self.rows) != num_ranks or not all(self.rows):
            filled = sum(map(bool, self.rows))
            yield f"has actions for {filled} ranks, and there are {num_ranks}."
            return
        owners = {(stage, rank) for rank, row in enumerate(self.rows) for stage, _, _ in row}
        for stage, count in sorted(Counter(stage for stage, _ in owners).items()):
            if count > 1:
                yield f"stage {stage} is on {count} ranks."
                return
        done = Counter((s, "B" if kind == "I" else kind, m) for row in self.rows for s, kind, m in row)
        halves = {(s, m) for row in self.rows for s, kind, m in row if kind == "I"}
        wanted = [
            (stage, kind, microbatch)
            for stage in range(self.num_stages)
            for microbatch in range(self.num_microbatches)
            for kind in ("FBW" if (stage, microbatch) in halves else "FB")
        ]
        if done != Counter(wanted):
            odd = next(action for action in wanted + list(done) if done[action] != (action in wanted))
            stage, kind, microbatch = odd
            yield f"{stage}{kind}{microbatch} happens {done[odd]} times."
        elif stuck := self._stuck():
            yield stuck

    def _stuck(self) -> str:
        """Where all ranks wait for each other; empty where all come to their end."""
        done: set[Action] = set()
        position = [0] * len(self.rows)
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(self.rows):
                while position[rank] < len(row) and self._needs(row[position[rank]]) <= done:
                    stage, kind, microbatch = row[position[rank]]
                    done.add((stage, "B" if kind == "I" else kind, microbatch))
                    position[rank] += 1
                    moved = True
        waiting = [
            f"rank {rank} at {stage}{kind}{microbatch}"
            for rank, row in enumerate(self.rows)
            for stage, kind, microbatch in row[position[rank] : position[rank] + 1]
        ]
        return f"ranks wait for each other: {', '.join(waiting)}." if waiting else ""

    def _needs(self, action: Action) -> set[Action]:
        stage, kind, microbatch = action
        if kind == "F":
            return {(stage - 1, "F", microbatch)} if stage else set()
        if kind == "W":
            return {(stage, "B", microbatch)}
        after = {(stage + 1, "B", microbatch)} if stage + 1 < self.num_stages else set()
        return {(stage, "F", microbatch)} | after
