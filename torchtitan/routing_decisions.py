"""What a forward decides about routing, for its recomputations to repeat: activation checkpointing.

T tokens, K top-k, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch

from torchtitan.routing import count_tokens


class Decisions:
    """What one forward decided about routing, for its recomputation to repeat."""

    def __init__(self):
        self.results: list[tuple[torch.Tensor, ...]] = []
        self.repeated: Iterator[tuple[torch.Tensor, ...]] | None = None


_DECISIONS: ContextVar[Decisions | None] = ContextVar("decisions", default=None)


def decide_once() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of a checkpointed forward and of its recomputations (`checkpoint`'s context_fn).

    In the second, router logits, row counts and load are not computed again but repeated.
    """
    decisions = Decisions()
    return _Deciding(decisions, repeat=False), _Deciding(decisions, repeat=True)


class _Deciding(AbstractContextManager):
    """Around a forward, or around each of its recomputations: a split backward has two."""

    def __init__(self, decisions: Decisions, repeat: bool):
        self.decisions, self.repeat = decisions, repeat

    def __enter__(self) -> None:
        self.decisions.repeated = iter(self.decisions.results) if self.repeat else None
        self.token = _DECISIONS.set(self.decisions)

    def __exit__(self, *exception: object) -> None:
        _DECISIONS.reset(self.token)


def once(compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """compute(), or in a recomputation what it returned before. For use where no compiler looks: inside of
    operators, and in exchanges between ranks."""
    decisions = _DECISIONS.get()
    if decisions is None:
        return compute()
    if repeats():
        return tuple(tensor.detach() for tensor in next(decisions.repeated))
    results = compute()
    decisions.results.append(tuple(tensor.detach() for tensor in results))
    return results


def repeats() -> bool:
    """Whether `once` would repeat now what it returned before."""
    decisions = _DECISIONS.get()
    return bool(decisions and decisions.repeated)


@torch.library.custom_op("torchtitan::keep", mutates_args=())
def keep(logits: torch.Tensor) -> torch.Tensor:
    """The same values, and the same again in a recomputation, so that it routes alike."""
    (kept,) = once(lambda: (logits.clone(),))
    return kept


@keep.register_fake
def _(logits: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(logits)


keep.register_autograd(lambda ctx, grad: grad)


@torch.library.custom_op("torchtitan::record_load", mutates_args=("load",))
def record_load(load: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Add to `load` (E,) int64 how often expert_ids (T, K) names each expert, not in a recomputation.

    Returns nothing of use: activation checkpointing by operation needs a result to save.
    """

    def count() -> tuple[torch.Tensor]:
        load.add_(count_tokens(expert_ids, len(load)))
        return (load.new_empty(0),)

    (nothing,) = once(count)
    return nothing


@record_load.register_fake
def _(load: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    return load.new_empty(0)
