"""Moves routed rows between the ranks that hold tokens and the ranks that hold their experts.

Forward and backward each move a row once in either direction; its score travels in the same
message. Row counts are exchanged once: activation checkpointing saves them, so a recomputation
neither asks again nor waits for the device.

Messages fly while other work is done. On their way to experts what is done meanwhile is up to the caller:
they leave in one autograd node and arrive in another, so that the gradients of what comes between
are worked out while gradients of rows fly back.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from torchtitan.distributed.comm import is_fake
from torchtitan.distributed.expert_parallel import float8_message
from torchtitan.ops.rows import sum_rows
from torchtitan.routing import Alignment, RowOrder, take
from torchtitan.routing_decisions import once, repeats

_SCORE_BYTES = 16
"""What a score takes beside its row: 4 bytes, the rest keeps rows aligned for wide loads."""


def launch(
    rows: torch.Tensor, num_sent: list[int], num_received: list[int], group: str
) -> torch.Tensor:
    """rows (N, *), the first num_sent[0] of them for rank 0 and so on, to (R, *) by sending rank.

    Nobody may read what is returned before `landed`. On GPUs it flies on a stream of the group's own; the
    rows are kept until it has landed. Operators of PyTorch without public names, checked on torch 2.13.
    """
    return torch.ops._c10d_functional.all_to_all_single(rows, num_received, num_sent, group)


def landed(flying: torch.Tensor) -> torch.Tensor:
    """The same tensor, once it is there; on GPUs the stream waits, the host does not."""
    return torch.ops._c10d_functional.wait_tensor(flying)


Counts = tuple[torch.Tensor, torch.Tensor]
"""(ranks, e) int64, rows that each rank has for each local expert; and on the host (2, ranks) int64, rows
sent to and received from each rank."""


def exchange_counts(counts: torch.Tensor, num_ranks: int, group: str) -> Callable[[], Counts]:
    """Send counts (E,) int64, the rows that this rank has for each expert; the result waits for others'.

    A recomputation sends nothing, and waits for nothing.
    """
    sent = counts.view(num_ranks, -1)
    each = [1] * num_ranks
    flying = sent if repeats() else launch(sent, each, each, group)

    def receive() -> Counts:
        received = landed(flying)
        return received, torch.stack([sent.sum(1), received.sum(1)]).cpu()

    return lambda: once(receive)


@dataclass(frozen=True)
class Splits:
    """How many rows go from this rank to each of the group, and come from each."""

    num_sent: list[int]
    num_received: list[int]
    group: str

    @classmethod
    def of(cls, totals: torch.Tensor, num_rows: int, group: str) -> "Splits":
        """From what `exchange_counts` brought to the host, for `num_rows` rows of own tokens."""
        return cls(*_known(totals, num_rows), group)

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """Launch (N, *) to the experts' ranks: (R, *), by sending rank."""
        return launch(rows, self.num_sent, self.num_received, self.group)

    def send_back(self, rows: torch.Tensor) -> torch.Tensor:
        """Launch (R, *) by sending rank, to (N, *)."""
        return launch(rows, self.num_received, self.num_sent, self.group)


def _known(totals: torch.Tensor, num_rows: int) -> list[list[int]]:
    """(2, ranks) on the host: rows to and from each rank. In a dry run as many each, or nearly."""
    if not is_fake(totals):
        return totals.tolist()
    share, left = divmod(num_rows, totals.shape[1])
    return [[share + (rank < left) for rank in range(totals.shape[1])]] * 2


@dataclass(frozen=True)
class Exchange:
    """Which rows go where: N rows of own tokens by expert, R received rows by local expert."""

    splits: Splits
    by_expert: torch.Tensor
    """(R,) int32: the received row (they come by rank) that is each row of an expert."""
    by_rank: torch.Tensor
    """(R,) int32: its inverse."""
    in_float8: bool = False
    """Whether rows travel to experts as float8; what comes back does not."""
    gaps: bool = False
    """Whether experts have rows that nobody sent: by_expert is -1 there, and R larger than received."""

    @classmethod
    def of(cls, received: torch.Tensor, splits: Splits, in_float8: bool) -> "Exchange":
        """From received (ranks, e), rows that each rank has for each local expert."""
        total = sum(splits.num_received)
        return cls(splits, _regroup(received, total), _regroup(received.T, total), in_float8)

    def aligned(self, alignment: Alignment) -> "Exchange":
        """The same rows with gaps between the groups of experts."""
        by_expert, by_rank = alignment.spread(self.by_expert), alignment.moved(self.by_rank)
        return replace(self, by_expert=by_expert, by_rank=by_rank, gaps=True)


def _regroup(counts: torch.Tensor, total: int) -> torch.Tensor:
    """Rows lie in runs of counts (a, b), b varying fastest: the index that puts a fastest, int32."""
    sizes = counts.T.flatten()
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).T.flatten()
    shift = starts - (sizes.cumsum(0) - sizes)
    rows = torch.arange(total, device=counts.device)
    return (rows + shift.repeat_interleave(sizes, output_size=total)).int()


@dataclass(frozen=True)
class Flight:
    """Rows of own tokens on their way to experts."""

    message: torch.Tensor
    """(R, *) by sending rank, some day."""
    link: torch.Tensor
    """(N, *) without memory of its own: its gradient is what flies back."""


class _Depart(torch.autograd.Function):
    """Links x and scores, which have left, to the rows that arrive."""

    @staticmethod
    def forward(ctx, x, scores, choices):
        ctx.save_for_backward(choices)
        return x.new_empty(()).expand(choices.numel(), x.shape[1] + _SCORE_BYTES // x.itemsize)

    @staticmethod
    def backward(ctx, flying):
        (choices,) = ctx.saved_tensors
        rows, scores = _unpack(landed(flying))
        scores = scores.index_select(0, choices.flatten()).view_as(choices)
        return sum_rows(rows, choices), scores, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link, message, exchange):
        ctx.splits = exchange.splits
        ctx.save_for_backward(exchange.by_rank)
        by_expert, gaps, message = exchange.by_expert, exchange.gaps, landed(message)
        if exchange.in_float8:
            return float8_message.unpack(take(message, by_expert, gaps), link.dtype)
        rows, scores = _unpack(message)
        return take(rows, by_expert, gaps), take(scores, by_expert, gaps)

    @staticmethod
    def backward(ctx, grad_rows, grad_scores):
        (by_rank,) = ctx.saved_tensors
        packed = _pack(grad_rows, grad_scores, by_rank, by_rank)
        return ctx.splits.send_back(packed), None, None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, order, exchange):
        ctx.exchange = exchange
        ctx.save_for_backward(order.tokens, exchange.by_expert)
        rows = exchange.splits.send_back(y.index_select(0, exchange.by_rank))
        return sum_rows(landed(rows), order.rows)

    @staticmethod
    def backward(ctx, grad):
        tokens, by_expert = ctx.saved_tensors
        exchange = ctx.exchange
        if exchange.in_float8:
            received = landed(exchange.splits.send(float8_message.pack(grad, tokens)))
            rows, _ = float8_message.unpack(take(received, by_expert, exchange.gaps), grad.dtype)
            return rows, None, None
        rows = landed(exchange.splits.send(grad.index_select(0, tokens)))
        return take(rows, by_expert, exchange.gaps), None, None


@torch.no_grad()
def pack(
    x: torch.Tensor, scores: torch.Tensor, order: RowOrder, in_float8: bool
) -> torch.Tensor:
    """The message of own tokens x (T, D) and scores (T, K) fp32 to their experts, by expert: (N, *)."""
    if in_float8:
        return float8_message.pack(x, order.tokens, scores.flatten(), order.slots)
    return _pack(x, scores.flatten(), order.tokens, order.slots)


def depart(
    x: torch.Tensor, scores: torch.Tensor, packed: torch.Tensor, order: RowOrder, splits: Splits
) -> Flight:
    """Launch to experts what `pack` made of x and scores, which get the gradients."""
    return Flight(splits.send(packed), _Depart.apply(x, scores, order.rows))


def arrive(flight: Flight, exchange: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """Wait for what flies: rows (R, D) and scores (R,), sorted by local expert."""
    return _Arrive.apply(flight.link, flight.message, exchange)


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


def _unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = packed.shape[1] - _SCORE_BYTES // packed.itemsize
    return packed[:, :width], _scores_in(packed, width)[:, 0]


def _scores_in(packed: torch.Tensor, width: int) -> torch.Tensor:
    return packed[:, width:].view(torch.float32)
