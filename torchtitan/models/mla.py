"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from a small latent.

B batch, L sequence, D model, H heads, C = qk_nope_head_dim + qk_rope_head_dim, V = v_head_dim.
"""

from dataclasses import dataclass

import torch
from torch import nn

from torchtitan.models.attention import attend
from torchtitan.models.attention_mask import AttentionMask
from torchtitan.models.init import Constant, Init, Normal
from torchtitan.models.rope import apply_rope_to_neighbours
from torchtitan.sharding import Fragment, Style


@dataclass(frozen=True)
class LatentConfig:
    """Widths of latent attention, named as in DeepSeek's config.json files."""

    q_lora_rank: int = 0
    """Width of the queries' latent; 0 computes queries directly."""
    kv_lora_rank: int = 512
    """Width of the latent that a token's keys and values of all heads are computed from."""
    qk_nope_head_dim: int = 128
    """Channels of a head's query and key without position."""
    qk_rope_head_dim: int = 64
    """Channels that are rotated; all heads share those of the key."""
    v_head_dim: int = 128

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def weights(self, dim: int, n_heads: int) -> int:
        """How many weights a layer has, norms aside."""
        queries = n_heads * self.qk_head_dim
        rank = self.q_lora_rank
        down = dim * (self.kv_lora_rank + self.qk_rope_head_dim)
        up = self.kv_lora_rank * n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        out = n_heads * self.v_head_dim * dim
        return (rank * (dim + queries) if rank else dim * queries) + down + up + out


class LatentAttention(nn.Module):
    """Causal self-attention with low-rank keys and values, and low-rank queries where set."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        widths: LatentConfig,
        score_factor: float,
        norm_eps: float,
        residual_std: float,
    ):
        super().__init__()
        self.core = attend  # context parallelism puts its own here
        self.widths = widths
        self.scale = widths.qk_head_dim**-0.5 * score_factor
        inputs = Normal(0.02, cutoff=3)
        self.inits: dict[str, Init] = {
            "wkv_a.weight": inputs,
            "kv_norm.weight": Constant(1.0),
            "wkv_b.weight": inputs,
            "wo.weight": Normal(residual_std, cutoff=3),
        }
        queries, rank = n_heads * widths.qk_head_dim, widths.q_lora_rank
        if rank:
            self.wq_a = nn.Linear(dim, rank, bias=False)
            self.q_norm = nn.RMSNorm(rank, eps=norm_eps)
            self.wq_b = nn.Linear(rank, queries, bias=False)
            self.inits |= {"wq_a.weight": inputs, "wq_b.weight": inputs}
            self.inits["q_norm.weight"] = Constant(1.0)
        else:
            self.wq = nn.Linear(dim, queries, bias=False)
            self.inits["wq.weight"] = inputs
        self.wkv_a = nn.Linear(dim, widths.kv_lora_rank + widths.qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(widths.kv_lora_rank, eps=norm_eps)
        keys_values = n_heads * (widths.qk_nope_head_dim + widths.v_head_dim)
        self.wkv_b = nn.Linear(widths.kv_lora_rank, keys_values, bias=False)
        self.wo = nn.Linear(n_heads * widths.v_head_dim, dim, bias=False)

    @property
    def fragment(self) -> Fragment:
        """The latents are computed whole on every rank, what lies between them and `wo` by head."""
        queries = {"wq": Style.HEADS_COLWISE}
        if self.widths.q_lora_rank:
            queries = {"wq_a": Style.LOCAL, "q_norm": Style.LOCAL, "wq_b": Style.HEADS_COLWISE}
        return {
            "": Style.HEADS,
            **queries,
            "wkv_a": Style.LOCAL,
            "kv_norm": Style.LOCAL,
            "wkv_b": Style.HEADS_COLWISE,
            "wo": Style.HEADS_ROWWISE,
        }

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        w = self.widths
        q = self.wq_b(self.q_norm(self.wq_a(x))) if w.q_lora_rank else self.wq(x)
        q = q.unflatten(-1, (-1, w.qk_head_dim))  # (B, L, H, C)
        q, q_position = q.split([w.qk_nope_head_dim, w.qk_rope_head_dim], dim=-1)
        latent, k_position = self.wkv_a(x).split([w.kv_lora_rank, w.qk_rope_head_dim], dim=-1)
        kv = self.wkv_b(self.kv_norm(latent)).unflatten(-1, (q.shape[2], -1))
        k, v = kv.split([w.qk_nope_head_dim, w.v_head_dim], dim=-1)
        q_position = apply_rope_to_neighbours(q_position, rope)
        k_position = apply_rope_to_neighbours(k_position.unsqueeze(2), rope)  # of all heads
        q = torch.cat([q, q_position], dim=-1)
        k = torch.cat([k, k_position.expand(-1, -1, k.shape[2], -1)], dim=-1)
        out = self.core(q, k, v, mask, self.scale)  # (B, L, H, V)
        return self.wo(out.flatten(-2))
