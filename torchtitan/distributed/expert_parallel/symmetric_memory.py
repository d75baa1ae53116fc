"""The symmetric-memory token dispatcher: GPUs of one host read and write each other's memory.

T tokens, K top-k, D model, e local experts, R rows that this rank has room for.
"""

from dataclasses import dataclass

import torch

from torchtitan import routing
from torchtitan.distributed.expert_parallel.peer_exchange import (
    PeerExchange,
    place,
    to_rows,
    to_tokens,
)
from torchtitan.distributed.expert_parallel.slices import in_place, own_slice
from torchtitan.routing import WholeDispatch


@dataclass(frozen=True)
class SymmetricMemoryMetadata:
    """What `combine` and the experts must know of one `dispatch`."""

    original_num_tokens: int
    """T"""
    own: slice
    """Which of the T tokens this rank dispatched."""
    targets: torch.Tensor
    """(ranks, tokens, K) int32: see `Placement`."""
    spoil: torch.Tensor | None
    """() for the sums: 0, or NaN where a rank had no room for all rows; None where there always is."""
    routed_scores: torch.Tensor | None
    """(R,) fp32, for the experts to weight with; None where `dispatch` already did."""


class SymmetricMemoryTokenDispatcher(WholeDispatch):
    """Takes the rows of this rank's experts out of all ranks' memory, and puts results back there.

    The host never learns how many rows there are: R is fixed, and what lies behind the last received
    row is undefined. Where a rank would receive more than R, all outputs of its group become NaN, so
    that no step is taken with them. With sp_size > 1 all ranks of a tensor-parallel group hold the same
    T tokens; each dispatches a slice, and the outputs of the group add up to the whole.
    """

    def __init__(
        self,
        exchange: PeerExchange,
        num_experts: int,
        score_before_experts: bool,
        sp_size: int = 1,
        sp_rank: int = 0,
    ):
        self.exchange = exchange
        self.num_experts = num_experts
        self.score_before_experts = score_before_experts
        self.sp_size = sp_size
        self.sp_rank = sp_rank
        # What a rank of the group received at most, or would have, since whoever reports it set this to 0.
        self.peak_received_bytes: int | torch.Tensor = 0
        self.received_bytes_limit = exchange.sizes.num_rows * exchange.row_bytes

    def dispatch(
        self,
        x: torch.Tensor,
        top_scores: torch.Tensor,
        selected_experts_indices: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, SymmetricMemoryMetadata]:
        """x (T, D), top_scores (T, K) fp32, selected_experts_indices (T, K) int64.

        Returns routed_input (R, D) sorted by local expert, num_tokens_per_expert (e,) int64, metadata.
        """
        own, sizes = own_slice(len(x), self.sp_size, self.sp_rank), self.exchange.sizes
        placement = place(self.exchange, selected_experts_indices[own])
        received = placement.most_rows * self.exchange.row_bytes
        self.peak_received_bytes = received.clamp(min=self.peak_received_bytes)
        spoil = None
        if sizes.num_rows < sizes.worst_case:
            missing = placement.most_rows > sizes.num_rows
            spoil = x.new_zeros(()).masked_fill(missing, float("nan"))
        rows, scores = to_rows(self.exchange, x[own], top_scores[own], placement.targets)
        if self.score_before_experts:
            rows, scores = routing.weight(rows, scores), None
        metadata = SymmetricMemoryMetadata(len(x), own, placement.targets, spoil, scores)
        return rows, placement.num_tokens_per_expert, metadata

    def combine(
        self, routed_output: torch.Tensor, metadata: SymmetricMemoryMetadata, x: torch.Tensor
    ) -> torch.Tensor:
        """routed_output (R, D), weighted; x as in `dispatch`. Returns (T, D): see the class."""
        own, num_tokens = metadata.own, metadata.original_num_tokens
        out = to_tokens(self.exchange, routed_output, metadata.targets, own.stop - own.start)
        if metadata.spoil is not None:
            out = out + metadata.spoil
        return in_place(out, own, num_tokens)
