"""Vocabulary in which a model says how its layers may be split: data only, no torch.

A layer class declares a fragment, {name inside the layer: Style}; a model assembles the fragments of
what it really builds into one plan. What a style means is distributed/styles.py's to know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Style(Enum):
    """How a module's weight is split over tensor-parallel ranks, and what goes in and out."""

    EMBEDDING = "embedding"
    """Rows of the table are split by token id; outputs are summed."""
    SEQUENCE = "sequence"
    """The weight is whole everywhere and works on each rank's part of the sequence."""
    GATHER = "gather"
    """No weight of its own; its first input is made whole for the modules inside."""
    COLWISE = "colwise"
    """Output features are split."""
    ROWWISE = "rowwise"
    """Input features are split; outputs are summed, and the sequence split again."""
    NORM_COLWISE = "norm colwise"
    """A norm over features that are split, and its weight with them."""
    LOCAL = "local"
    """The weight is whole everywhere and used for each rank's own work; its gradient is summed."""
    HEADS = "heads"
    """Attention, by head: inside, activations are local tensors and their gradients stay partial."""
    HEADS_COLWISE = "heads colwise"
    """Inside: output features are split; so is what each head has a number of, in any attention."""
    HEADS_ROWWISE = "heads rowwise"
    """Inside: input features are split; outputs are summed, and the sequence split again."""
    REGION = "region"
    """An MoE layer; inside, activations are local tensors and their gradients stay partial."""
    REGION_COLWISE = "region colwise"
    """In a region: output features are split."""
    REGION_ROWWISE = "region rowwise"
    """In a region: input features are split; outputs are left to be summed at its boundary."""
    EXPERTS = "experts"
    """Weights (E, ..., F, D) and (E, D, F) of many experts: spread by expert, split along F.

    Of their biases (E, ..., F) alike; (E, D) is whole, and added once.
    """
    HEAD = "head"
    """The output projection: the vocabulary is split, its input made whole."""


EXPERT_HIDDEN_DIM = 2
"""F in the shapes of experts' weights."""

Fragment = Mapping[str, Style]
"""Styles by a module's name inside its layer; "" is the layer itself."""


@dataclass(frozen=True)
class Rule:
    """The style of every module whose name matches; `*` stands for one part of a dotted name."""

    pattern: str
    style: Style


@dataclass(frozen=True)
class ParallelPlan:
    """All a model says about how it may be spread."""

    rules: tuple[Rule, ...]
    fsdp_units: tuple[tuple[str, ...], ...]
    """Names of the modules to shard together, in forward order; the rest belongs to the root."""


def under(prefix: str, fragment: Fragment) -> tuple[Rule, ...]:
    """A fragment's rules for a layer at `prefix`, which may hold `*`."""
    return tuple(
        Rule(f"{prefix}.{name}" if name else prefix, style) for name, style in fragment.items()
    )
