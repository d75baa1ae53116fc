"""The mixture-of-experts layer: router, dispatcher, experts and shared experts.

B batch, L sequence, T = B * L tokens (batch-major), D model, E experts, K top-k.
"""

import torch
from torch import nn

from torchtitan.models.feed_forward import FeedForward
from torchtitan.models.moe.balance import SumCounts, balance_loss, with_loss
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.dispatch import LocalTokenDispatcher, TokenDispatcher
from torchtitan.models.moe.experts import GroupedExperts
from torchtitan.models.moe.router import Routing, TokenChoiceTopKRouter
from torchtitan.ops.quantized_kernels import row_alignment
from torchtitan.routing_decisions import record_load
from torchtitan.sharding import Fragment, Style


class MoE(nn.Module):
    """Takes the place of the feed-forward layer: each token goes to K of E experts.

    Expert parallelism replaces `dispatcher`; nothing else in here knows of ranks.
    """

    def __init__(self, dim: int, config: MoEConfig, residual_std: float):
        super().__init__()
        self.router = TokenChoiceTopKRouter(dim, config, init_std=0.02)
        self.experts = GroupedExperts(
            dim,
            config.ffn_dim,
            config.num_experts,
            residual_std,
            config.experts_backend,
            config.max_rows_per_chunk,
            config.activation,
            config.experts_bias,
        )
        shared_dim = config.num_shared_experts * config.ffn_dim
        self.shared_experts = FeedForward(dim, shared_dim, residual_std) if shared_dim else None
        self.dispatcher: TokenDispatcher = LocalTokenDispatcher(
            config.num_experts, config.score_before_experts
        )
        self.exchange_in_float8 = False
        self.config = config
        # What a run's layout and batch make of these, expert parallelism and the trainer set.
        self.load_copies = 1  # ranks that route the same tokens
        self.sequence_parts = 1  # ranks that route parts of the same sequences
        self.sum_counts: SumCounts = lambda counts: counts
        self.sequences_per_step = 1
        load = torch.empty(config.num_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", load, persistent=False)
        bias = torch.empty(config.num_experts) if config.load_balance_coeff else None
        self.register_buffer("expert_bias", bias)
        previous = torch.empty_like(load) if config.global_balance_coeff else None
        self.register_buffer("previous_load", previous)

    @property
    def fragment(self) -> Fragment:
        """Styles of the parts that this layer has."""
        fragment = {
            "": Style.REGION,
            "router.gate": Style.LOCAL,
            "experts": Style.EXPERTS,
        }
        if self.shared_experts is not None:
            fragment |= {
                "shared_experts.w1": Style.REGION_COLWISE,
                "shared_experts.w2": Style.REGION_ROWWISE,
                "shared_experts.w3": Style.REGION_COLWISE,
            }
        return fragment

    def quantize_experts(self, backend: str, exchange_in_float8: bool = False) -> None:
        """Let experts multiply by a quantizing backend, on rows aligned as it asks.

        With exchange_in_float8, rows that go to experts of other ranks do so as float8.
        """
        self.experts.backend = backend
        self.dispatcher = LocalTokenDispatcher(
            self.config.num_experts, self.config.score_before_experts, row_alignment(backend)
        )
        self.exchange_in_float8 = exchange_in_float8

    def fill_buffers(self, device: torch.device) -> None:
        """Start without load and without bias, after the model has left the meta device."""
        self.tokens_per_expert = torch.zeros_like(self.tokens_per_expert, device=device)
        if self.expert_bias is not None:
            self.expert_bias = torch.zeros_like(self.expert_bias, device=device)
        if self.previous_load is not None:
            self.previous_load = torch.zeros_like(self.previous_load, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, L, D) -> (B, L, D)."""
        tokens = x.reshape(-1, x.shape[-1])
        choice = self.router(tokens, self.expert_bias)
        scores = choice.top_scores
        if self.training:
            record_load(self.tokens_per_expert, choice.selected_experts_indices)
            if self.config.has_balance_loss:
                scores = with_loss(scores, self._balance_loss(choice, num_sequences=len(x)))
        return self.apply_experts(x, scores, choice.selected_experts_indices)

    def _balance_loss(self, choice: Routing, num_sequences: int) -> torch.Tensor:
        """This rank's part of the mean over the global batch's sequences."""
        loss = balance_loss(
            self.config,
            choice,
            num_sequences,
            self.sequence_parts,
            self.sum_counts,
            self.previous_load,
        )
        return loss / (self.sequences_per_step * self.load_copies)

    def apply_experts(
        self, x: torch.Tensor, scores: torch.Tensor, expert_ids: torch.Tensor
    ) -> torch.Tensor:
        """The routed experts' weighted sum and the shared experts': x (..., D) -> (..., D).

        scores and expert_ids (T, K). Between ranks rows are on their way while shared experts compute,
        and so are gradients of rows in backward.
        """
        dispatcher, tokens = self.dispatcher, x.reshape(-1, x.shape[-1])
        if type(dispatcher) is LocalTokenDispatcher and not dispatcher.score_before_experts:
            # All experts are here: they gather their rows, and sum each token's, by themselves.
            order, counts = dispatcher.sort(expert_ids)
            out = self.experts(tokens, counts, scores, order)
            shared = self._shared(tokens)
        else:
            started = dispatcher.start(tokens, scores, expert_ids)
            shared = self._shared(tokens)
            rows, counts, metadata = dispatcher.finish(started)
            del started  # holds what came, as it came
            rows = self.experts(rows, counts, metadata.routed_scores)
            out = dispatcher.combine(rows, metadata, tokens)
        return (out if shared is None else out + shared).view_as(x)

    def _shared(self, tokens: torch.Tensor) -> torch.Tensor | None:
        return None if self.shared_experts is None else self.shared_experts(tokens)
