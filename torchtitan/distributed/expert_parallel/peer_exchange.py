"""Moves routed rows through memory that all ranks reach: no size of any message is known to the host.

P ranks, T tokens that a rank has at most, K top-k, D model, E experts, e = E / P local experts, R rows
that a rank has room for. Rows lie where the all-to-all exchange would put them: by local expert,
then by the rank they come from, then by token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torchtitan.distributed.expert_parallel.peer_memory import (
    Layout,
    PeerMemory,
    lay_out,
    size_of,
)
from torchtitan.ops.peer_rows import pull, push
from torchtitan.ops.rows import sum_rows
from torchtitan.routing import count_tokens, sort_by_expert
from torchtitan.routing_decisions import once


@dataclass(frozen=True)
class Placement:
    """Where the rows of all ranks' tokens lie here."""

    targets: torch.Tensor
    """(P, T, K) int32: the row of each choice; -1 where there is none here."""
    num_tokens_per_expert: torch.Tensor
    """(e,) int64; the sum is at most R."""
    most_rows: torch.Tensor
    """() int64: what the rank with most rows would have received; above R, rows are missing."""


@dataclass(frozen=True)
class Sizes:
    """What an exchange is made for."""

    num_ranks: int
    num_tokens: int
    top_k: int
    dim: int
    num_experts: int
    capacity_factor: float
    """Rows that a rank has room for, over those it would get if all ranks got as many."""

    @property
    def worst_case(self) -> int:
        """Rows of a rank to which every token goes with as many choices as it has experts."""
        local = self.num_experts // self.num_ranks
        return self.num_ranks * self.num_tokens * min(self.top_k, local)

    @property
    def num_rows(self) -> int:
        """R"""
        return min(self.worst_case, round(self.capacity_factor * self.num_tokens * self.top_k))

    def layout(self, dtype: torch.dtype) -> Layout:
        """What each rank's memory holds: what peers read, and where they write."""
        choices = self.num_tokens, self.top_k
        return {
            "expert_counts": ((self.num_experts,), torch.int64),
            "expert_choices": ((2, *choices), torch.int32),
            "tokens": ((self.num_tokens, self.dim), dtype),
            "scores": (choices, torch.float32),
            "returned_rows": ((*choices, self.dim), dtype),
            "returned_scores": (choices, torch.float32),
        }


class PeerExchange:
    """The exchanges of all layers of a model, one after the other, through one piece of memory."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, open_memory: Callable[[int], PeerMemory]):
        """open_memory(bytes) is collective. What the memory holds is in `dtype`."""
        self.sizes, self.dtype = sizes, dtype
        layout = sizes.layout(dtype)
        self.num_bytes = size_of(layout)
        self.row_bytes = sizes.dim * dtype.itemsize
        self.memory = open_memory(self.num_bytes)
        self.tensors = lay_out(self.memory, layout)
        self.written = ""

    def place(self, expert_ids: torch.Tensor) -> Placement:
        """Of this rank's tokens' choices (T', K), T' <= T: tell all ranks, and place everyone's rows."""
        num_tokens, rank = len(expert_ids), self.memory.rank
        if num_tokens > self.sizes.num_tokens:
            room = self.sizes.num_tokens
            raise ValueError(f"{num_tokens} tokens at a time; symmetric memory was set up for {room}")
        counts = count_tokens(expert_ids, self.sizes.num_experts)
        before = counts.cumsum(0) - counts
        positions = sort_by_expert(expert_ids).rows - before[expert_ids]
        self._before_writing("choices")
        own = self.tensors["expert_choices"].of_rank[rank]
        own[0, :num_tokens], own[1, :num_tokens] = expert_ids, positions
        own[:, num_tokens:] = -1
        self.tensors["expert_counts"].of_rank[rank].copy_(counts)
        self.memory.barrier()
        choices = torch.stack(self.tensors["expert_choices"].of_rank)
        counts = torch.stack(self.tensors["expert_counts"].of_rank)
        return place_rows(choices, counts, rank, self.sizes.num_rows)

    def to_rows(
        self, x: torch.Tensor, scores: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Own tokens (T', D), scores (T', K) or None, to this rank's experts' (R, D) and (R,)."""
        assert x.dtype == self.dtype, f"{x.dtype}, and memory holds {self.dtype}"
        self._before_writing("tokens")
        self._own("tokens", len(x)).copy_(x)
        if scores is not None:
            self._own("scores", len(x)).copy_(scores)
        self.memory.barrier()
        of_rows = None if scores is None else self.tensors["scores"]
        return pull(self.tensors["tokens"], of_rows, targets, self.sizes.num_rows)

    def to_tokens(
        self,
        rows: torch.Tensor,
        scores: torch.Tensor | None,
        targets: torch.Tensor,
        num_tokens: int,
    ) -> tuple[torch.Tensor, ...]:
        """This rank's experts' rows (R, D), scores (R,) or None, to own tokens' sums (T', D) and (T', K)."""
        assert rows.dtype == self.dtype, f"{rows.dtype}, and memory holds {self.dtype}"
        self._before_writing("returned")
        to = None if scores is None else self.tensors["returned_scores"]
        push(rows, scores, targets, self.tensors["returned_rows"], to)
        self.memory.barrier()
        returned = self._own("returned_rows", num_tokens).flatten(0, 1)
        in_order = torch.arange(len(returned), device=rows.device).view(num_tokens, self.sizes.top_k)
        sums = sum_rows(returned, in_order)
        return (sums,) if scores is None else (sums, self._own("returned_scores", num_tokens).clone())

    def _own(self, name: str, num_tokens: int) -> torch.Tensor:
        return self.tensors[name].of_rank[self.memory.rank][:num_tokens]

    def _before_writing(self, what: str) -> None:
        """Peers may still read what was written last, until a barrier that comes after their reading.

        Every exchange has one between its writing and its reading. So one of another kind in between
        is enough, and only the same kind twice in a row needs a barrier more.
        """
        if self.written == what:
            self.memory.barrier()
        self.written = what


def place_rows(
    choices: torch.Tensor, counts: torch.Tensor, rank: int, num_rows: int
) -> Placement:
    """Rows of rank `rank`, from all ranks' choices and their counts (P, E).

    choices (P, 2, T, K) int32: each choice's expert, -1 where a rank has fewer tokens, and the place
    among that rank's choices of the same expert. Rows beyond num_rows are left out.
    """
    experts, positions = choices.unbind(1)
    num_ranks = len(counts)
    num_local = counts.shape[1] // num_ranks
    local = counts[:, rank * num_local : (rank + 1) * num_local]  # (P, e)
    in_order = local.T.flatten()
    starts = (in_order.cumsum(0) - in_order).view(num_local, num_ranks).T  # (P, e)
    experts = experts - rank * num_local
    first = starts.gather(1, experts.clamp(0, num_local - 1).flatten(1).long()).view_as(experts)
    rows = first + positions
    here = (experts >= 0) & (experts < num_local) & (rows < num_rows)
    ends = local.sum(0).cumsum(0).clamp(max=num_rows)
    return Placement(
        rows.masked_fill(~here, -1).int(),
        ends.diff(prepend=ends.new_zeros(1)),
        counts.unflatten(1, (num_ranks, num_local)).sum((0, 2)).max(),
    )


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scores, targets, exchange):
        ctx.exchange, ctx.num_tokens = exchange, len(x)
        ctx.save_for_backward(targets)
        # Also where a recomputation may keep rows: R of them take more than fetching tokens again.
        return exchange.to_rows(x, scores, targets)

    @staticmethod
    def backward(ctx, grad_rows, grad_scores):
        (targets,) = ctx.saved_tensors
        grads = ctx.exchange.to_tokens(
            grad_rows.contiguous(), grad_scores.contiguous(), targets, ctx.num_tokens
        )
        return *grads, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, targets, num_tokens, exchange):
        ctx.exchange = exchange
        ctx.save_for_backward(targets)
        (sums,) = exchange.to_tokens(rows, None, targets, num_tokens)
        return sums

    @staticmethod
    def backward(ctx, grad):
        (targets,) = ctx.saved_tensors
        (grad_rows,) = ctx.exchange.to_rows(grad, None, targets)
        return grad_rows, None, None, None


def place(exchange: PeerExchange, expert_ids: torch.Tensor) -> Placement:
    """`exchange.place`, which a recomputation repeats instead of asking again."""

    def decide() -> tuple[torch.Tensor, ...]:
        placement = exchange.place(expert_ids)
        return placement.targets, placement.num_tokens_per_expert, placement.most_rows

    return Placement(*once(decide))


def to_rows(
    exchange: PeerExchange, x: torch.Tensor, scores: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`exchange.to_rows` of tokens and scores, with gradients."""
    return _ToRows.apply(x, scores, targets, exchange)


def to_tokens(
    exchange: PeerExchange, rows: torch.Tensor, targets: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """`exchange.to_tokens` of rows alone, with gradients."""
    return _ToTokens.apply(rows, targets, num_tokens, exchange)
