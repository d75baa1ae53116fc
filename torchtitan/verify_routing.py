"""Routing in the oracle: one process's choices of experts are recorded, and repeated on the layout.

A token whose best experts are nearly tied may go elsewhere on another layout, by rounding alone; its
gradients would then differ for no fault of the layout. So every layout repeats the reference's
choices, and what its own routers would have chosen is compared with them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from torchtitan.model_parts import ModelParts
from torchtitan.models.moe.router import score
from torchtitan.sequence_part import SequencePart

NEAR_TIE = 1e-4
"""How far apart, relative to the better one, scores may be that a layout ranks the other way."""


@dataclass(frozen=True)
class Choices:
    """What one process's router chose in one step: S sequences of L tokens, K of E experts."""

    ids: torch.Tensor
    """(S, L, K) int64."""
    scores: torch.Tensor
    """(S, L, E) fp32, as ranked: with the balance bias."""


@dataclass(frozen=True)
class LayerRouting:
    """How a layer's routing on the layout compares with one process's, over all steps."""

    name: str
    choices: int
    """Of experts, by tokens, over all ranks."""
    flips: int
    """Tokens whose experts would have been others."""
    margin: float
    """The widest relative distance of scores that were ranked the other way."""
    load_equal: bool
    """The counts of tokens by expert are one process's, exactly."""
    near_tie: float
    """The margin up to which scores may be ranked the other way."""

    @property
    def passed(self) -> bool:
        return self.load_equal and self.margin < self.near_tie


@dataclass(frozen=True)
class Flips:
    """What one rank compared of one layer."""

    choices: int
    flips: int
    margin: float

    def plus(self, other: "Flips") -> "Flips":
        """Both together."""
        choices, flips = self.choices + other.choices, self.flips + other.flips
        return Flips(choices, flips, max(self.margin, other.margin))


Recorded = dict[str, list[Choices]]
"""By MoE layer, the choices of each step."""


class Recorder:
    """Keeps the choices of a whole model on one process, a step being one forward."""

    def __init__(self, model: ModelParts, num_sequences: int):
        self.steps: Recorded = {}
        self.num_sequences = num_sequences
        for name, module in model.named_modules():
            if name.endswith(".router"):
                steps = self.steps.setdefault(name.removesuffix(".router"), [])
                module.register_forward_hook(self._keep(steps))

    def _keep(self, steps: list[Choices]):
        def hook(router, inputs, choice):
            shape = (self.num_sequences, -1)
            scores = score(router.config, choice.logits.detach())
            if len(inputs) > 1 and inputs[1] is not None:
                scores = scores + inputs[1]
            ids = choice.selected_experts_indices
            steps.append(Choices(ids.unflatten(0, shape), scores.unflatten(0, shape)))

        return hook


class Replayer:
    """Repeats recorded choices on one rank of a layout, and compares its own with them.

    The rank has `part` of every sequence, of which it routes piece `place` of `split`.
    """

    def __init__(
        self, model: ModelParts, part: SequencePart, split: int, place: int, recorded: Recorded
    ):
        self.recorded, self.part, self.split, self.place = recorded, part, split, place
        self.step = 0
        self.own: dict[tuple[str, int, int], list[torch.Tensor]] = {}
        self.seen = {name: Flips(0, 0, 0.0) for name in recorded}
        if recorded:
            model.entering = self._enter

    @contextmanager
    def repeat(self, step: int) -> Iterator[None]:
        """Around forward and backward of a step."""
        self.step = step
        self.own.clear()
        yield
        for (name, start, stop), record in self.own.items():
            choices, rows = self.recorded[name][step], slice(start, stop)
            flips = _compare(record[0], self._own(choices.ids, rows), self._own(choices.scores, rows))
            self.seen[name] = self.seen[name].plus(flips)

    def _enter(self, module: nn.Module, rows: slice) -> None:
        """Have routers in `module` repeat what was chosen for these sequences of the global batch."""
        for name, layer in module.named_modules():
            if name in self.recorded:
                key = name, rows.start, rows.stop
                layer.router.replay = self._own(self.recorded[name][self.step].ids, rows)
                # A recomputation enters again and chooses again, after the first.
                layer.router.record = self.own.setdefault(key, [])

    def _own(self, whole: torch.Tensor, rows: slice) -> torch.Tensor:
        """Of these sequences, what this rank routes."""
        return self.part.cut(whole[rows]).chunk(self.split, dim=1)[self.place].flatten(0, 1)


def _compare(own: torch.Tensor, theirs: torch.Tensor, scores: torch.Tensor) -> Flips:
    """own and theirs (T, K) ids; scores (T, E) that led to `theirs`."""
    mine, reference = (_chosen(ids, scores) for ids in (own, theirs))
    flipped = (mine != reference).any(1)
    if not flipped.any():
        return Flips(len(own), 0, 0.0)
    # The least that the reference preferred, over the most it left out that we would have taken.
    wanted = scores.where(reference & ~mine, float("inf")).amin(1)[flipped]
    taken = scores.where(mine & ~reference, float("-inf")).amax(1)[flipped]
    margin = ((wanted - taken).abs() / wanted.abs().clamp(min=1e-12)).max().item()
    return Flips(len(own), int(flipped.sum()), margin)


def _chosen(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)


def summarize(
    flips: Sequence[dict[str, Flips]],
    loads: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    near_tie: float,
) -> list[LayerRouting]:
    """Of all ranks' flips, and each step's counts (layers, E) beside one process's."""
    rows = []
    for i, name in enumerate(flips[0]):
        found = [rank[name] for rank in flips]
        rows.append(
            LayerRouting(
                name,
                sum(each.choices for each in found),
                sum(each.flips for each in found),
                max(each.margin for each in found),
                all(torch.equal(a[i], b[i]) for a, b in zip(loads, expected, strict=True)),
                near_tie,
            )
        )
    return rows
