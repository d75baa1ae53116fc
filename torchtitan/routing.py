"""Pure functions of routing: counts, the order of rows, and sums over a token's rows.

T tokens, K top-k, E experts, N = T * K routed rows, D model. Everything is deterministic, forward and
backward: sums are gathers in a fixed order, never atomic additions.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from torchtitan.ops.rows import sum_rows


class Decisions:
    """What one forward decided about routing, for its recomputation to repeat."""

    def __init__(self, keep_rows: bool):
        self.keep_rows = keep_rows
        self.results: list[tuple[torch.Tensor, ...]] = []
        self.repeated: Iterator[tuple[torch.Tensor, ...]] | None = None


_DECISIONS: ContextVar[Decisions | None] = ContextVar("decisions", default=None)


def decide_once(keep_rows: bool = False) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of a checkpointed forward and of its recomputations (`checkpoint`'s context_fn).

    In the second, router logits, row counts and load are not computed again but repeated; with
    `keep_rows` so are received rows, which take more memory and save an exchange.
    """
    decisions = Decisions(keep_rows)
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


def once(
    compute: Callable[[], tuple[torch.Tensor, ...]], rows: bool = False
) -> tuple[torch.Tensor, ...]:
    """compute(), or in a recomputation what it returned before. For use inside of operators.

    `rows` says that these are received rows.
    """
    decisions = _DECISIONS.get()
    if decisions is None or (rows and not decisions.keep_rows):
        return compute()
    if repeats(rows):
        return tuple(tensor.detach() for tensor in next(decisions.repeated))
    results = compute()
    decisions.results.append(tuple(tensor.detach() for tensor in results))
    return results


def repeats(rows: bool = False) -> bool:
    """Whether `once` would repeat now what it returned before."""
    decisions = _DECISIONS.get()
    return bool(decisions and decisions.repeated and (decisions.keep_rows or not rows))


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


def count_tokens(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert is named in expert_ids (any shape, int64): (E,) int64."""
    ids = expert_ids.flatten()
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add(0, ids, torch.ones_like(ids))


@dataclass(frozen=True)
class RowOrder:
    """Where the rows of each token lie once they are sorted by expert."""

    tokens: torch.Tensor
    """(N,) int64: the token of each row."""
    slots: torch.Tensor
    """(N,) int64: its place in the flattened (T, K)."""
    rows: torch.Tensor
    """(T, K) int64: the row of each choice; the inverse of `slots`."""


def sort_by_expert(expert_ids: torch.Tensor) -> RowOrder:
    """Order the T * K choices (T, K) by expert; among equals the earlier token comes first."""
    ids = expert_ids.flatten()
    slots = ids.argsort(stable=True)
    rows = torch.empty_like(slots)
    rows[slots] = torch.arange(len(slots), device=slots.device)
    return RowOrder(slots // max(expert_ids.shape[1], 1), slots, rows.view_as(expert_ids))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tokens, rows):
        ctx.save_for_backward(rows)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return sum_rows(grad, rows), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, tokens, rows):
        ctx.save_for_backward(tokens)
        return sum_rows(y, rows)

    @staticmethod
    def backward(ctx, grad):
        (tokens,) = ctx.saved_tensors
        return grad.index_select(0, tokens), None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, slots, rows):
        ctx.save_for_backward(rows)
        return scores.flatten().index_select(0, slots)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows.flatten()).view_as(rows), None, None


def spread(x: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """Each token's row K times, in the order of experts: x (T, D) to (N, D)."""
    return _Spread.apply(x, order.tokens, order.rows)


def reorder(scores: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """The score of each row: (T, K) to (N,)."""
    return _Reorder.apply(scores, order.slots, order.rows)


def weight(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """rows (N, D) times scores (N,) in fp32, rounded once to rows' dtype."""
    return (rows * scores.unsqueeze(1)).to(rows.dtype)


def collect(y: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """The transpose of `spread`: out[t] = sum over k of y[rows[t, k]], in fp32, rounded once."""
    return _Collect.apply(y, order.tokens, order.rows)
