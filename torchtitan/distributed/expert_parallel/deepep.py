"""The DeepEP token dispatcher: a token travels once to each rank that it needs, and becomes rows there.

T tokens, K top-k, D model, e local experts, M tokens that came, R rows of them for experts here.
https://github.com/deepseek-ai/DeepEP; the library is imported only where this dispatcher is asked for.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from torchtitan import routing
from torchtitan.distributed.expert_parallel.slices import in_place, own_slice
from torchtitan.routing import RowOrder, WholeDispatch
from torchtitan.routing_decisions import once

Handle = tuple[torch.Tensor, ...]
"""DeepEP's own notes of who sent what to whom."""


@dataclass(frozen=True)
class Arrival:
    """What came of all ranks' tokens."""

    tokens: torch.Tensor
    """(M, D)"""
    scores: torch.Tensor
    """(M, K) fp32"""
    order: RowOrder
    """Of the R rows; choices of experts elsewhere have row -1."""
    num_tokens_per_expert: torch.Tensor
    """(e,) int64"""
    handle: Handle


@dataclass(frozen=True)
class DeepEPMetadata:
    """What `combine` and the experts must know of one `dispatch`."""

    original_num_tokens: int
    """T"""
    own: slice
    """Which of the T tokens this rank dispatched."""
    order: RowOrder
    """Where the rows of each token that came lie."""
    handle: Handle
    routed_scores: torch.Tensor | None
    """(R,) fp32, for the experts to weight with; None where `dispatch` already did."""


class DeepEPTokenDispatcher(WholeDispatch):
    """Sends tokens through a `deep_ep.Buffer`, and expands them to rows on the rank of their experts.

    Sums over a token's rows on one rank are rounded before they travel back. With sp_size > 1 all
    ranks of a tensor-parallel group hold the same T tokens; each dispatches a slice, and the outputs
    of the group add up to the whole.
    """

    received_bytes_limit = float("inf")

    def __init__(
        self,
        buffer: Any,
        num_ranks: int,
        num_experts: int,
        score_before_experts: bool,
        sp_size: int = 1,
        sp_rank: int = 0,
    ):
        self.buffer = buffer
        self.num_ranks = num_ranks
        self.num_experts = num_experts
        self.score_before_experts = score_before_experts
        self.sp_size = sp_size
        self.sp_rank = sp_rank
        self.peak_received_bytes = 0  # of one dispatch, since whoever reports it set this to 0

    def dispatch(
        self,
        x: torch.Tensor,
        top_scores: torch.Tensor,
        selected_experts_indices: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, DeepEPMetadata]:
        """x (T, D), top_scores (T, K) fp32, selected_experts_indices (T, K) int64.

        Returns routed_input (R, D) sorted by local expert, num_tokens_per_expert (e,) int64, metadata.
        The host waits for how many tokens come.
        """
        own = own_slice(len(x), self.sp_size, self.sp_rank)
        tokens, scores, expert_ids = x[own], top_scores[own], selected_experts_indices[own]
        arrival = self._send(tokens.detach(), scores.detach(), expert_ids)
        order = arrival.order
        tokens, scores = _Arrive.apply(tokens, scores, arrival, self.buffer)
        rows = routing.spread(tokens, order)
        scores = scores.flatten().index_select(0, order.slots)
        self.peak_received_bytes = max(self.peak_received_bytes, rows.nbytes)
        if self.score_before_experts:
            rows, scores = routing.weight(rows, scores), None
        metadata = DeepEPMetadata(len(x), own, order, arrival.handle, scores)
        return rows, arrival.num_tokens_per_expert, metadata

    def combine(
        self, routed_output: torch.Tensor, metadata: DeepEPMetadata, x: torch.Tensor
    ) -> torch.Tensor:
        """routed_output (R, D), weighted; x as in `dispatch`. Returns (T, D): see the class."""
        sums = routing.collect(routed_output, metadata.order)
        out = _Return.apply(sums, metadata.handle, self.buffer)
        return in_place(out, metadata.own, metadata.original_num_tokens)

    def _send(self, x: torch.Tensor, scores: torch.Tensor, expert_ids: torch.Tensor) -> Arrival:
        """A recomputation knows all but the tokens, and needs no layout to be worked out again."""
        tokens: list[torch.Tensor] = []

        def send() -> tuple[torch.Tensor, ...]:
            layout = self.buffer.get_dispatch_layout(expert_ids, self.num_experts)
            per_rank, per_node, per_expert, in_rank, _ = layout
            came, local_ids, of_came, counts, handle, _ = self.buffer.dispatch(
                x,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=expert_ids,
                topk_weights=scores,
            )
            tokens.append(came)
            order, on_device = _order(local_ids, self.num_experts // self.num_ranks, sum(counts))
            return of_came, order.slots, order.rows, on_device, *handle

        of_came, slots, rows, counts, *handle = once(send)
        came = tokens[0] if tokens else self.buffer.dispatch(x, handle=tuple(handle))[0]
        return Arrival(came, of_came, RowOrder(slots, rows), counts, tuple(handle))


def _order(
    local_ids: torch.Tensor, num_local: int, num_rows: int
) -> tuple[RowOrder, torch.Tensor]:
    """Rows by local expert, and how many each has; local_ids (M, K) is -1 where the expert is elsewhere."""
    ids = local_ids.flatten().long()
    ids = ids.masked_fill(ids < 0, num_local)
    slots = ids.argsort(stable=True)[:num_rows]
    counts = routing.count_tokens(ids, num_local + 1)[:num_local]
    rows = torch.full_like(local_ids, -1, dtype=torch.int32)
    return routing.row_order(slots, rows), counts


class _Arrive(torch.autograd.Function):
    """The transpose of sending: gradients go the way back."""

    @staticmethod
    def forward(ctx, x, scores, arrival, buffer):
        ctx.handle, ctx.buffer = arrival.handle, buffer
        return arrival.tokens, arrival.scores

    @staticmethod
    def backward(ctx, grad_tokens, grad_scores):
        grad, of_scores, _ = ctx.buffer.combine(
            grad_tokens.contiguous(), ctx.handle, topk_weights=grad_scores.contiguous()
        )
        return grad, of_scores, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums, handle, buffer):
        ctx.handle, ctx.buffer = handle, buffer
        return buffer.combine(sums, handle)[0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None


def open_buffer(group: dist.ProcessGroup, row_bytes: int) -> Any:
    """A buffer for rows of this size, for all layers. Collective."""
    from deep_ep import Buffer

    size = group.size()
    configs = Buffer.get_dispatch_config(size), Buffer.get_combine_config(size)
    over_nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs)
    over_network = max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs)
    return Buffer(group, over_nvlink, over_network)
