"""Brings tokens to experts and back; here for experts that all live on the same rank.

T tokens, K top-k, N = T * K routed rows, R rows that the experts get, D model, e local experts.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from torchtitan import routing
from torchtitan.routing import Alignment, RowOrder, WholeDispatch


@dataclass(frozen=True)
class DispatchMetadata:
    """What `combine` and the experts must know of one `dispatch`."""

    original_num_tokens: int
    """T, before any padding."""
    order: RowOrder
    """Where each token's rows went."""
    routed_scores: torch.Tensor | None
    """(R,) fp32, for the experts to weight with; None where `dispatch` already did."""


class TokenDispatcher(Protocol):
    """Tokens to rows sorted by local expert, and back. Holds no parameters."""

    score_before_experts: bool

    def dispatch(
        self,
        x: torch.Tensor,
        top_scores: torch.Tensor,
        selected_experts_indices: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchMetadata]:
        """x (T, D), top_scores (T, K) fp32, selected_experts_indices (T, K) int64.

        Returns routed_input (R, D), num_tokens_per_expert (e,) int64, metadata.
        """
        ...

    def start(
        self,
        x: torch.Tensor,
        top_scores: torch.Tensor,
        selected_experts_indices: torch.Tensor,
    ) -> Any:
        """The first part of `dispatch`: rows may be on their way after it, while the caller computes."""
        ...

    def finish(self, started: Any) -> tuple[torch.Tensor, torch.Tensor, DispatchMetadata]:
        """The second part, of what `start` returned, once: what `dispatch` returns."""
        ...

    def combine(
        self, routed_output: torch.Tensor, metadata: DispatchMetadata, x: torch.Tensor
    ) -> torch.Tensor:
        """routed_output (R, D), weighted; x as in `dispatch`. Returns each token's sum, (T, D)."""
        ...


class LocalTokenDispatcher(WholeDispatch):
    """Sorts rows by expert; nothing leaves the rank.

    With row_alignment > 1, rows of zeros with scores of zero fill each expert's rows up to a multiple
    of it, and are counted: what quantized products need.
    """

    def __init__(self, num_experts: int, score_before_experts: bool, row_alignment: int = 1):
        self.num_experts = num_experts
        self.score_before_experts = score_before_experts
        self.row_alignment = row_alignment

    def dispatch(
        self,
        x: torch.Tensor,
        top_scores: torch.Tensor,
        selected_experts_indices: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchMetadata]:
        order, counts = self.sort(selected_experts_indices)
        rows, scores = routing.spread(x, order), routing.reorder(top_scores, order)
        if self.score_before_experts:
            rows, scores = routing.weight(rows, scores), None
        return rows, counts, DispatchMetadata(len(x), order, scores)

    def sort(self, selected_experts_indices: torch.Tensor) -> tuple[RowOrder, torch.Tensor]:
        """What `dispatch` knows before it moves a row: order and counts (E,) int64."""
        order = routing.sort_by_expert(selected_experts_indices)
        counts = routing.count_tokens(selected_experts_indices, self.num_experts)
        if self.row_alignment > 1:
            alignment = Alignment.of(counts, len(order.slots), self.row_alignment)
            order, counts = order.aligned(alignment), alignment.counts
        return order, counts

    def combine(
        self, routed_output: torch.Tensor, metadata: DispatchMetadata, x: torch.Tensor
    ) -> torch.Tensor:
        return routing.collect(routed_output, metadata.order)
