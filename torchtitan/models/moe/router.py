"""Chooses each token's experts.

T tokens, D model, E experts, K top-k.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan import routing
from torchtitan.models.init import Constant, Init, Normal
from torchtitan.models.moe.config import MoEConfig
from torchtitan.ops.top_k import top_k
from torchtitan.ops.wide import widened
from torchtitan.ops.wide_linear import wide_linear
from torchtitan.routing_decisions import keep


@dataclass(frozen=True)
class Routing:
    """What the router says of T tokens. Scores and logits are fp32 (fp64 for fp64 tokens).

    The scores of all experts, which most routers never compute, are `score` of the logits.
    """

    top_scores: torch.Tensor
    """(T, K): the weight of each chosen expert."""
    selected_experts_indices: torch.Tensor
    """(T, K) int64: the experts, best first."""
    logits: torch.Tensor
    """(T, E)"""


def score(config: MoEConfig, logits: torch.Tensor) -> torch.Tensor:
    """Scores (..., E) from logits (..., E), neither normalised over the chosen nor scaled."""
    return logits.softmax(-1) if config.score_func == "softmax" else logits.sigmoid()


class TokenChoiceTopKRouter(nn.Module):
    """Each token takes the K experts of the best scores.

    `replay`, ids (T, K) int64 that differ within a token, takes the place of the choice; where `record`
    is a list, every forward appends what it would choose itself, recomputations included.
    """

    def __init__(self, dim: int, config: MoEConfig, init_std: float):
        super().__init__()
        candidates = config.num_experts * config.num_limited_groups // config.num_expert_groups
        assert config.top_k <= candidates, f"top-{config.top_k} of {candidates} experts"
        self.config = config
        self.gate = nn.Linear(dim, config.num_experts, bias=config.router_bias)
        self.replay: torch.Tensor | None = None
        self.record: list[torch.Tensor] | None = None
        self.inits: dict[str, Init] = {"gate.weight": Normal(init_std, cutoff=3)}
        if config.router_bias:
            self.inits["gate.bias"] = Constant(0.0)

    def forward(self, x: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        """x (T, D); correction_bias (E,) fp32 is added to scores for the choice only."""
        # Everything after `keep` is computed again from the same bits under recomputation.
        logits = keep(self._logits(x))
        if self.config.force_load_balance:
            ids = self._take_turns(logits)
        else:
            ids = self._choose(logits.detach(), correction_bias)
        if self.record is not None:
            self.record.append(ids)
        if self.replay is not None:
            ids = self.replay
        return Routing(self._weights(logits, ids), ids, logits)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        if not self.config.router_in_fp32:
            return widened(self.gate(x))
        weight, bias = self.gate.weight, self.gate.bias
        if x.dtype == weight.dtype == torch.bfloat16:
            logits = wide_linear(x, weight)
        else:
            logits = F.linear(widened(x), widened(weight))
        return logits if bias is None else logits + bias

    def _choose(self, logits: torch.Tensor, correction_bias: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        adjusted = correction_bias is not None or config.num_expert_groups > 1
        # Logits rank as their scores do; what is added up needs the scores themselves.
        ranking = score(config, logits) if adjusted and not config.score_chosen_only else logits
        if correction_bias is not None:
            ranking = ranking + correction_bias
        if config.num_expert_groups > 1:
            ranking = ranking.masked_fill(~self._in_best_groups(ranking), float("-inf"))
        return top_k(ranking, config.top_k)

    def _in_best_groups(self, scores: torch.Tensor) -> torch.Tensor:
        """(T, E) bool. A group is as good as its best experts together."""
        config = self.config
        groups = scores.unflatten(1, (config.num_expert_groups, -1))
        quality = groups.topk(config.num_scores_per_group, dim=-1).values.sum(-1)
        best = quality.topk(config.num_limited_groups, dim=-1).indices
        chosen = torch.zeros_like(quality, dtype=torch.bool).scatter(1, best, True)
        return chosen.unsqueeze(-1).expand_as(groups).flatten(1)

    def _take_turns(self, logits: torch.Tensor) -> torch.Tensor:
        num_tokens, num_experts = logits.shape
        turns = torch.arange(num_tokens * self.config.top_k, device=logits.device)
        return (turns % num_experts).view(num_tokens, self.config.top_k)

    def _weights(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.score_func == "softmax" and not (config.route_norm or config.score_chosen_only):
            top_scores = routing.of_chosen(score(config, logits), ids)
        else:
            # Chosen scores of a softmax over their sum are a softmax of chosen logits, which keeps less.
            top_scores = score(config, routing.of_chosen(logits, ids))
            if config.route_norm and config.score_func == "sigmoid":
                # They can all be zero.
                top_scores = top_scores / (top_scores.sum(-1, keepdim=True) + 1e-20)
        return top_scores if config.route_scale == 1 else top_scores * config.route_scale
