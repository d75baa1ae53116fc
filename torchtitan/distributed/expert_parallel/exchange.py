"""Moves routed rows between the ranks that hold tokens and the ranks that hold their experts.

Forward and backward each move a row once in either direction; its score travels in the same
message. Row counts are exchanged once: activation checkpointing saves them, so a recomputation
neither asks again nor waits for the device.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from torchtitan.distributed.comm import group_named, is_fake
from torchtitan.distributed.expert_parallel import float8_message
from torchtitan.ops.rows import sum_rows
from torchtitan.routing import Alignment, RowOrder, once, take

_SCORE_BYTES = 16
"""What a score takes beside its row: 4 bytes, the rest keeps rows aligned for wide loads."""


@torch.library.custom_op("torchtitan::exchange_counts", mutates_args=())
def exchange_counts(
    counts: torch.Tensor, num_ranks: int, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """counts (E,) int64: rows that this rank has for each expert of the group.

    Returns (num_ranks, e) int64, rows that each rank has for each local expert; and on the host
    (2, num_ranks) int64, rows sent to and received from each rank.
    """

    def exchange() -> tuple[torch.Tensor, torch.Tensor]:
        sent = counts.view(num_ranks, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group_named(group))
        return received, torch.stack([sent.sum(1), received.sum(1)]).cpu()

    return once(exchange)


@exchange_counts.register_fake
def _(counts: torch.Tensor, num_ranks: int, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    received = counts.new_empty(num_ranks, len(counts) // num_ranks)
    return received, counts.new_empty(2, num_ranks, device="cpu")


@torch.library.custom_op("torchtitan::exchange_rows", mutates_args=())
def exchange_rows(
    rows: torch.Tensor, num_sent: list[int], num_received: list[int], group: str
) -> torch.Tensor:
    """rows (N, D), the first num_sent[0] of them for rank 0 and so on, to (R, D) by sending rank."""
    received = rows.new_empty(sum(num_received), rows.shape[1])
    dist.all_to_all_single(received, rows, num_received, num_sent, group=group_named(group))
    return received


@exchange_rows.register_fake
def _(
    rows: torch.Tensor, num_sent: list[int], num_received: list[int], group: str
) -> torch.Tensor:
    return rows.new_empty(sum(num_received), rows.shape[1])


@dataclass(frozen=True)
class Exchange:
    """Which rows go where: N rows of own tokens by expert, R received rows by local expert."""

    num_sent: list[int]
    num_received: list[int]
    by_expert: torch.Tensor
    """(R,) int64: the received row (they come by rank) that is each row of an expert."""
    by_rank: torch.Tensor
    """(R,) int64: its inverse."""
    group: str
    gaps: bool = False
    """Whether experts have rows that nobody sent: by_expert is -1 there, and R larger than received."""
    in_float8: bool = False
    """Whether rows travel to experts as float8; what comes back does not."""

    @classmethod
    def of(
        cls, received: torch.Tensor, splits: torch.Tensor, num_rows: int, group: str
    ) -> "Exchange":
        """From what `exchange_counts` returns, for `num_rows` rows of own tokens."""
        num_sent, num_received = _known(splits, num_rows)
        total = sum(num_received)
        by_expert = _regroup(received, total)
        by_rank = _regroup(received.T, total)
        return cls(num_sent, num_received, by_expert, by_rank, group)

    def aligned(self, alignment: Alignment) -> "Exchange":
        """The same rows with gaps between the groups of experts."""
        by_expert, by_rank = alignment.spread(self.by_expert), alignment.places[self.by_rank]
        return replace(self, by_expert=by_expert, by_rank=by_rank, gaps=True)

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, *) to the experts' ranks: (R, *), by sending rank."""
        return exchange_rows(rows, self.num_sent, self.num_received, self.group)

    def send_back(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, *) by sending rank, to (N, *)."""
        return exchange_rows(rows, self.num_received, self.num_sent, self.group)


def _known(splits: torch.Tensor, num_rows: int) -> list[list[int]]:
    """(2, ranks) on the host: rows to and from each rank. In a dry run as many each, or nearly."""
    if not is_fake(splits):
        return splits.tolist()
    share, left = divmod(num_rows, splits.shape[1])
    return [[share + (rank < left) for rank in range(splits.shape[1])]] * 2


def _regroup(counts: torch.Tensor, total: int) -> torch.Tensor:
    """Rows lie in runs of counts (a, b), b varying fastest: the index that puts a fastest."""
    sizes = counts.T.flatten()
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).T.flatten()
    shift = starts - (sizes.cumsum(0) - sizes)
    rows = torch.arange(total, device=counts.device)
    return rows + shift.repeat_interleave(sizes, output_size=total)


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scores, order, exchange):
        ctx.exchange = exchange
        ctx.save_for_backward(order.rows, exchange.by_rank)
        by_expert, gaps = exchange.by_expert, exchange.gaps
        if exchange.in_float8:
            packed = float8_message.pack(x, order.tokens, scores.flatten(), order.slots)
            return float8_message.unpack(take(exchange.send(packed), by_expert, gaps), x.dtype)
        packed = _pack(x, scores.flatten(), order.tokens, order.slots)
        rows, scores = _unpack(exchange.send(packed), x.shape[1])
        return take(rows, by_expert, gaps), take(scores, by_expert, gaps)

    @staticmethod
    def backward(ctx, grad_rows, grad_scores):
        choices, by_rank = ctx.saved_tensors
        packed = _pack(grad_rows, grad_scores, by_rank, by_rank)
        rows, scores = _unpack(ctx.exchange.send_back(packed), grad_rows.shape[1])
        scores = scores.index_select(0, choices.flatten()).view_as(choices)
        return sum_rows(rows, choices), scores, None, None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, order, exchange):
        ctx.exchange = exchange
        ctx.save_for_backward(order.tokens, exchange.by_expert)
        rows = exchange.send_back(y.index_select(0, exchange.by_rank))
        return sum_rows(rows, order.rows)

    @staticmethod
    def backward(ctx, grad):
        tokens, by_expert = ctx.saved_tensors
        exchange = ctx.exchange
        if exchange.in_float8:
            received = exchange.send(float8_message.pack(grad, tokens))
            rows, _ = float8_message.unpack(take(received, by_expert, exchange.gaps), grad.dtype)
            return rows, None, None
        rows = exchange.send(grad.index_select(0, tokens))
        return take(rows, by_expert, exchange.gaps), None, None


def to_experts(
    x: torch.Tensor, scores: torch.Tensor, order: RowOrder, exchange: Exchange
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, D) and scores (T, K) fp32 of own tokens to (R, D) and (R,), sorted by local expert."""
    return _ToExperts.apply(x, scores, order, exchange)


def from_experts(y: torch.Tensor, order: RowOrder, exchange: Exchange) -> torch.Tensor:
    """Experts' rows (R, D) to the sum of each own token's rows, (T, D)."""
    return _FromExperts.apply(y, order, exchange)


def _pack(
    rows: torch.Tensor, scores: torch.Tensor, of_rows: torch.Tensor, of_scores: torch.Tensor
) -> torch.Tensor:
    """rows[of_rows] and scores[of_scores] side by side, in rows' dtype: (N, D + a few)."""
    width = rows.shape[1]
    packed = rows.new_empty(len(of_rows), width + _SCORE_BYTES // rows.itemsize)
    torch.index_select(rows, 0, of_rows, out=packed[:, :width])
    _scores_in(packed, width)[:, 0] = scores.index_select(0, of_scores)
    return packed


def _unpack(packed: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return packed[:, :width], _scores_in(packed, width)[:, 0]


def _scores_in(packed: torch.Tensor, width: int) -> torch.Tensor:
    return packed[:, width:].view(torch.float32)
