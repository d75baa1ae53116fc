"""The shape of a mixture-of-experts layer."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MoEConfig:
    """One MoE layer; a family's flavors differ in these numbers, `[model.overrides.moe]` sets them."""

    num_experts: int
    top_k: int
    ffn_dim: int
    """Hidden width of one expert."""
    num_shared_experts: int = 0
    """Experts that every token uses, computed as one feed-forward layer of that many widths."""
    activation: Literal["swiglu", "gpt_oss"] = "swiglu"
    """Between an expert's projections; gpt-oss's is clamped and leans on a steeper sigmoid."""
    experts_bias: bool = False
    """The experts' projections have biases."""

    score_func: Literal["softmax", "sigmoid"] = "softmax"
    """Turns router logits into scores, in fp32."""
    score_chosen_only: bool = False
    """Scores are computed among the chosen experts' logits, not among all."""
    route_norm: bool = False
    """The chosen scores of a token are divided by their sum."""
    route_scale: float = 1.0
    """Factor on the scores, after normalisation."""
    score_before_experts: bool = False
    """Scores multiply the experts' input instead of their output."""
    router_bias: bool = False
    """The router's projection has a bias."""
    router_in_fp32: bool = False
    """The router multiplies in fp32, as DeepSeek's does, whatever the layer's dtype."""
    num_expert_groups: int = 1
    """Experts are chosen within the best groups only; DeepSeek-V3's `n_group`."""
    num_limited_groups: int = 1
    """How many groups that is; `topk_group`."""
    num_scores_per_group: int = 2
    """A group is as good as the sum of this many best scores: 2 in DeepSeek-V3, 1 in V2."""

    load_balance_coeff: float = 0.0
    """Step of the balance bias, which is added to scores for the choice only (arXiv 2408.15664)."""
    sequence_balance_coeff: float = field(default=0.0, metadata={"set_by": "moe.sequence_balance_coeff"})
    """Of the loss on each sequence's balance."""
    global_balance_coeff: float = field(default=0.0, metadata={"set_by": "moe.global_balance_coeff"})
    """Of the loss on the global batch's balance."""
    router_z_coeff: float = field(default=0.0, metadata={"set_by": "moe.router_z_coeff"})
    """Of the loss on the size of router logits."""
    force_load_balance: bool = field(default=False, metadata={"set_by": "debug.moe_force_load_balance"})
    """Experts take turns whatever the router says; for benchmarks."""
    experts_backend: Literal["auto", "reference"] = field(default="auto", metadata={"set_by": "moe.experts_backend"})
    """What multiplies: see models/moe/experts.py."""
    max_rows_per_chunk: int = field(default=0, metadata={"set_by": "moe.max_rows_per_chunk"})
    """Rows that experts' intermediates may hold at a time, or 0."""

    @property
    def has_balance_loss(self) -> bool:
        """Whether any of the three losses is on."""
        return any((self.sequence_balance_coeff, self.global_balance_coeff, self.router_z_coeff))
