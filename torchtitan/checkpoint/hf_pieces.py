"""Which part of a model's tensors each tensor of Hugging Face files is, and how its axes lie there.

"Ours" are the model's parameters and saved buffers, "theirs" the tensors in the files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.weight_map import Drop, OnlyOurs, Twin, WeightMap, match, rule_for

Slices = tuple[slice, ...]
Source = Callable[[Slices], torch.Tensor]
"""Reads a part of a tensor of theirs."""
MOST_NAMED = 10
"""Tensors in a message."""


@dataclass(frozen=True)
class Piece:
    """A tensor of theirs, and the box of one of ours that it fills."""

    theirs: str
    ours: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of the box, in ours."""
    num_stacked: int
    """Leading axes of ours, of size 1 in the box, that theirs does not have."""
    axes: str | None
    """How its other axes become those of ours; see `Permute`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of theirs."""
        sizes = self.sizes[self.num_stacked :]
        if self.axes is None:
            return sizes
        groups, order = _parse(self.axes)
        size = dict(zip(order, sizes, strict=True))
        return tuple(prod(size[axis] for axis in group) for group in groups)

    def read(self, source: Source, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """A part of the box, as ours has it: what of theirs it lies in is read."""
        box = [slice(start, start + length) for start, length in zip(offsets, lengths)]
        box = box[self.num_stacked :]
        if self.axes is None:
            return source(tuple(box)).reshape(lengths)
        groups, order = _parse(self.axes)
        wanted = dict(zip(order, box))
        size = dict(zip(order, self.sizes[self.num_stacked :]))
        hull, split, cut = [], [], []
        # Of axes that are merged in theirs, only the outermost can be read in part.
        for outer, *inner in groups:
            first, last, width = wanted[outer].start, wanted[outer].stop, prod(map(size.get, inner))
            hull.append(slice(first * width, last * width))
            split += [last - first, *map(size.get, inner)]
            cut += [slice(None), *map(wanted.get, inner)]
        part = source(tuple(hull)).reshape(split)[tuple(cut)]
        names = [axis for group in groups for axis in group]
        return part.permute([names.index(axis) for axis in order]).reshape(lengths)

    def write(self, box: torch.Tensor) -> torch.Tensor:
        """Theirs, contiguous, of the whole box of ours."""
        part = box.reshape(self.sizes[self.num_stacked :])
        if self.axes is not None:
            groups, order = _parse(self.axes)
            part = part.permute([order.index(axis) for group in groups for axis in group])
        return part.reshape(self.shape).contiguous()


def _parse(axes: str) -> tuple[list[list[str]], list[str]]:
    """ "a (b c) -> c a b" -> [[a], [b, c]], [c, a, b]."""
    theirs, _, ours = axes.partition("->")
    groups, inside = [], False
    for token in theirs.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            inside = token == "("
            groups += [[]] if inside else []
        elif inside:
            groups[-1].append(token)
        else:
            groups.append([token])
    return groups, ours.split()


def pieces(table: WeightMap, shapes: Mapping[str, Sequence[int]]) -> list[Piece]:
    """All that files must have, in the order of our tensors; ConfigError for one without a rule."""
    try:
        return [piece for name, shape in shapes.items() for piece in _pieces_of(table, name, shape)]
    except LookupError as error:
        raise ConfigError([Fault("model.overrides", f"{error}.")]) from None


def _pieces_of(table: WeightMap, name: str, shape: Sequence[int]) -> Iterator[Piece]:
    rule, layer = rule_for(table, name)
    for part in rule.parts(layer, shape):
        num_stacked = len(part.index)
        offsets = (*part.index, *[0] * (len(shape) - num_stacked))
        sizes = (*[1] * num_stacked, *shape[num_stacked:])
        yield Piece(part.name, name, offsets, sizes, num_stacked, part.axes)


def only_ours(table: WeightMap, names: Iterable[str]) -> dict[str, OnlyOurs]:
    """The rules of those of our tensors that no file has."""
    rules = {name: rule_for(table, name)[0] for name in names}
    return {name: rule for name, rule in rules.items() if isinstance(rule, OnlyOurs)}


def is_statistic(table: WeightMap, name: str) -> bool:
    """Whether a tensor of ours is of training only, so that a model is the same without it."""
    left_out = [r for r in table if isinstance(r, OnlyOurs) and not r.must_be_zero]
    return any(match(rule.ours, name) is not None for rule in left_out)


def twins(table: WeightMap, names: Iterable[str]) -> dict[str, str]:
    """Names that are second copies, with what they are copies of."""
    rules = [rule for rule in table if isinstance(rule, Twin)]
    return {n: rule.of for n in names for rule in rules if match(rule.theirs, n) is not None}


def is_dropped(table: WeightMap, name: str, num_layers: int) -> bool:
    """Whether a model of so many layers leaves a tensor of theirs unread."""
    found = (match(rule.theirs, name) for rule in table if isinstance(rule, Drop))
    return any(f is not None and int(f.get("extra_layer", num_layers)) >= num_layers for f in found)


def mismatches(
    where: Path, expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]
) -> Iterator[Fault]:
    """Every tensor that is missing, unknown or of another shape."""
    if missing := sorted(expected.keys() - found.keys()):
        yield Fault(str(where), f"lacks {_listed(missing)}.")
    if extra := sorted(found.keys() - expected.keys()):
        yield Fault(str(where), f"the model has no place for {_listed(extra)}.")
    misshapen = [
        f"{name} {list(found[name])} in place of {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if misshapen:
        yield Fault(str(where), f"of another shape than in the model: {_listed(misshapen)}.")


def _listed(words: Sequence[str]) -> str:
    """With another model's checkpoint there may be thousands."""
    more = len(words) - MOST_NAMED
    return ", ".join(words[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
