"""Vocabulary in which a family says how Hugging Face files name and lay out its tensors: data only.

A table of rules is played either way, to read such files and to write them. `{layer}` in a name
stands for a layer's index, `{expert}` for an expert's. "Ours" are the model's parameters and saved
buffers, "theirs" the tensors in the files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A tensor of theirs, and where it lies in the one of ours that it belongs to: ours[index]."""

    name: str
    index: tuple[int, ...] = ()
    axes: str | None = None
    """How its axes become those of ours, as in `Permute`; None: they are the same."""


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    ours: str
    theirs: str

    def parts(self, layer: str, shape: Sequence[int]) -> Iterator[Part]:
        yield Part(self.theirs.replace("{layer}", layer))


@dataclass(frozen=True)
class Stack:
    """Ours has all experts, along dimension 0; theirs has tensors of each.

    With several of them an expert, dimension 1 of ours counts these: gate and up, for example.
    """

    ours: str
    theirs: tuple[str, ...]

    def parts(self, layer: str, shape: Sequence[int]) -> Iterator[Part]:
        for expert in range(shape[0]):
            for i, theirs in enumerate(self.theirs):
                name = theirs.replace("{layer}", layer).replace("{expert}", str(expert))
                yield Part(name, (expert,) if len(self.theirs) == 1 else (expert, i))


@dataclass(frozen=True)
class Permute:
    """The same numbers with axes transposed, split or merged, from theirs to ours.

    "e d (f p) -> e p f d": the last axis of theirs alternates between gate and up (p), ours has them
    apart, and transposed. Axes of ours stand alone, and have the sizes.
    """

    ours: str
    theirs: str
    axes: str

    def parts(self, layer: str, shape: Sequence[int]) -> Iterator[Part]:
        yield Part(self.theirs.replace("{layer}", layer), axes=self.axes)


@dataclass(frozen=True)
class OnlyOurs:
    """Theirs has no such tensor: reading leaves it as it is."""

    ours: str
    reason: str
    must_be_zero: bool = True
    """What the model computes depends on it, so that writing needs it to be all zeros."""

    def parts(self, layer: str, shape: Sequence[int]) -> Iterator[Part]:
        yield from ()


@dataclass(frozen=True)
class Twin:
    """A second copy of another tensor of theirs that some files have; reading compares the two."""

    theirs: str
    of: str


@dataclass(frozen=True)
class Drop:
    """A tensor of theirs that the model does not use; an `{extra_layer}` is one past our last."""

    theirs: str
    reason: str


Rule = Rename | Stack | Permute | OnlyOurs
"""Says where a tensor of ours comes from."""
WeightMap = tuple[Rule | Twin | Drop, ...]


def rule_for(table: WeightMap, ours: str) -> tuple[Rule, str]:
    """The first rule for a tensor of ours, and its layer's index or ""; LookupError without one."""
    for rule in table:
        if not isinstance(rule, Twin | Drop) and (found := match(rule.ours, ours)) is not None:
            return rule, found.get("layer", "")
    raise LookupError(f"no rule says what {ours} is called in Hugging Face files")


def match(pattern: str, name: str) -> dict[str, str] | None:
    """The indices in a name that fits a pattern, by placeholder; None where it does not fit."""
    expression = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(pattern))
    expression = expression.replace(r"\*", ".+")
    found = re.fullmatch(expression, name)
    return None if found is None else found.groupdict()
