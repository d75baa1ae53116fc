"""The all-to-all token dispatcher: rows travel to the ranks that own their experts, and back.

T tokens, K top-k, D model, E experts, e = E / ep local experts, R rows received by this rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from torchtitan import routing
from torchtitan.distributed.expert_parallel.exchange import (
    Exchange,
    Flight,
    Splits,
    arrive,
    depart,
    exchange_counts,
    from_experts,
    pack,
)
from torchtitan.routing import RowOrder


@dataclass(frozen=True)
class AllToAllMetadata:
    """What `combine` and the experts must know of one `dispatch`."""

    original_num_tokens: int
    """T, before any padding."""
    order: RowOrder
    """Where the rows of this rank's own tokens lie, sorted by expert."""
    exchange: Exchange
    routed_scores: torch.Tensor | None
    """(R,) fp32, for the experts to weight with; None where `dispatch` already did."""


@dataclass(frozen=True)
class Dispatching:
    """Rows on their way, between `start` and `finish`."""

    original_num_tokens: int
    """T, before any padding."""
    order: RowOrder
    received: torch.Tensor
    """(ranks, e) int64: rows that each rank has for each local expert."""
    splits: Splits
    flight: Flight


class AllToAllTokenDispatcher:
    """Sends each routed row to the rank of `ep_mesh` that owns its expert.

    With sp_size > 1 all ranks of a tensor-parallel group hold the same T tokens; each dispatches the
    slice sp_rank of them, padded to a multiple of sp_size, and `combine` returns its own tokens'
    sums in a zero buffer: the outputs of the group add up to the whole.
    """

    received_bytes_limit = float("inf")
    exchange_in_float8 = False

    def __init__(
        self,
        ep_mesh: DeviceMesh,
        num_experts: int,
        score_before_experts: bool,
        sp_size: int = 1,
        sp_rank: int = 0,
    ):
        self.ep_mesh = ep_mesh
        self.num_experts = num_experts
        self.score_before_experts = score_before_experts
        self.sp_size = sp_size
        self.sp_rank = sp_rank
        self.group = ep_mesh.get_group().group_name
        self.peak_received_bytes = 0  # of one dispatch, since whoever reports it set this to 0

    def dispatch(
        self,
        x: torch.Tensor,
        top_scores: torch.Tensor,
        selected_experts_indices: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, AllToAllMetadata]:
        """x (T, D), top_scores (T, K) fp32, selected_experts_indices (T, K) int64.

        Returns routed_input (R, D) sorted by local expert, num_tokens_per_expert (e,) int64, metadata.
        One device-to-host copy: of how many rows go to and come from each rank.
        """
        return self.finish(self.start(x, top_scores, selected_experts_indices))

    def start(
        self,
        x: torch.Tensor,
        top_scores: torch.Tensor,
        selected_experts_indices: torch.Tensor,
    ) -> Dispatching:
        """Launch what `dispatch` brings; rows are made ready while row counts are exchanged."""
        num_tokens = len(x)
        x, scores, expert_ids = self._split_along_sp(x, top_scores, selected_experts_indices)
        counts = routing.count_tokens(expert_ids, self.num_experts)
        receive_counts = exchange_counts(counts, self.ep_mesh.size(), self.group)
        order = routing.sort_by_expert(expert_ids)
        packed = pack(x, scores, order, self.exchange_in_float8)
        received, totals = receive_counts()
        splits = Splits.of(totals, expert_ids.numel(), self.group)
        flight = depart(x, scores, packed, order, splits)
        return Dispatching(num_tokens, order, received, splits, flight)

    def finish(
        self, started: Dispatching
    ) -> tuple[torch.Tensor, torch.Tensor, AllToAllMetadata]:
        """Wait for the rows; returns what `dispatch` does."""
        order, received = started.order, started.received
        exchange = Exchange.of(received, started.splits, self.exchange_in_float8)
        counts, exchange = self._arrange(received.sum(0), exchange)
        rows, scores = arrive(started.flight, exchange)
        self.peak_received_bytes = max(self.peak_received_bytes, rows.nbytes)
        if self.score_before_experts:
            rows, scores = routing.weight(rows, scores), None
        metadata = AllToAllMetadata(started.original_num_tokens, order, exchange, scores)
        return rows, counts, metadata

    def combine(
        self, routed_output: torch.Tensor, metadata: AllToAllMetadata, x: torch.Tensor
    ) -> torch.Tensor:
        """routed_output (R, D), weighted; x as in `dispatch`. Returns (T, D): see the class."""
        out = from_experts(routed_output, metadata.order, metadata.exchange)
        if self.sp_size == 1:
            return out
        before = self.sp_rank * len(out)
        after = (self.sp_size - 1) * len(out) - before
        return F.pad(out, (0, 0, before, after))[: metadata.original_num_tokens]

    def _arrange(
        self, counts: torch.Tensor, exchange: Exchange
    ) -> tuple[torch.Tensor, Exchange]:
        """How experts want their rows, of which each has counts (e,)."""
        return counts, exchange

    def _split_along_sp(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Slice sp_rank of each tensor's rows; zero rows are added where they do not divide.

        A zero row goes to expert 0 with score 0, and `combine` drops it: it adds nothing to outputs
        and gradients.
        """
        if self.sp_size == 1:
            return tensors
        size = -(-len(tensors[0]) // self.sp_size)
        return tuple(_slice(tensor, self.sp_rank * size, size) for tensor in tensors)


def _slice(tensor: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """Rows [start, start + size) of (T, *), zero beyond T."""
    part = tensor[start : start + size]
    return part if len(part) == size else F.pad(part, (0, 0, 0, size - len(part)))
