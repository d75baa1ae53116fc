"""Qwen3 (arXiv 2505.09388), dense and MoE: normalised queries and keys, heads of a fixed width."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from torchtitan.models.attention import Attention
from torchtitan.models.decoder import DecoderConfig, WideHeadsConfig
from torchtitan.models.hf_format import (
    DECODER_FIELDS,
    DECODER_FIXED,
    DECODER_WEIGHTS,
    EXPERT_WEIGHTS,
    KEY_VALUE_WEIGHTS,
    Field,
    HFFormat,
    leading_layers,
)
from torchtitan.models.init import Constant
from torchtitan.models.moe.config import MoEConfig
from torchtitan.sharding import Fragment, Style
from torchtitan.weight_map import Rename


@dataclass(frozen=True)
class Qwen3Config(WideHeadsConfig):
    """A decoder with normalised queries and keys."""

    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_seq_len: int = 40960

    def build_attention(self, layer_id: int, residual_std: float) -> nn.Module:
        return NormedAttention(
            self.dim, self.n_heads, self.n_kv_heads, self.head_dim, residual_std, self.norm_eps
        )


class NormedAttention(Attention):
    """Attention whose queries and keys are normalised, each head by itself."""

    fragment: Fragment = {**Attention.fragment, "q_norm": Style.LOCAL, "k_norm": Style.LOCAL}

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        residual_std: float,
        norm_eps: float,
    ):
        super().__init__(dim, n_heads, n_kv_heads, head_dim, residual_std)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.inits |= {"q_norm.weight": Constant(1.0), "k_norm.weight": Constant(1.0)}

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


_debugmodel = Qwen3Config(
    dim=256,
    n_layers=8,
    n_heads=16,
    n_kv_heads=8,
    ffn_dim=768,
    vocab_size=2048,
    enable_weight_tying=True,
)
# Sizes from the models' config.json files; up to 4B the embedding is the output weight too.
_0_6B = Qwen3Config(
    dim=1024,
    n_layers=28,
    n_heads=16,
    n_kv_heads=8,
    ffn_dim=3072,
    vocab_size=151936,
    enable_weight_tying=True,
)
_8B = replace(_0_6B, dim=4096, n_layers=36, n_heads=32, ffn_dim=12288, enable_weight_tying=False)
_moe = MoEConfig(num_experts=128, top_k=8, ffn_dim=768, route_norm=True)

FLAVORS: dict[str, DecoderConfig] = {
    "debugmodel": _debugmodel,
    "0.6B": _0_6B,
    "1.7B": replace(_0_6B, dim=2048, ffn_dim=6144),
    "4B": replace(_0_6B, dim=2560, n_layers=36, n_heads=32, ffn_dim=9728),
    "8B": _8B,
    "14B": replace(_8B, dim=5120, n_layers=40, n_heads=40, ffn_dim=17408),
    "32B": replace(_8B, dim=5120, n_layers=64, n_heads=64, ffn_dim=25600),
    "debugmodel_moe": replace(
        _debugmodel, moe=replace(_moe, num_experts=64, ffn_dim=64), enable_weight_tying=False
    ),
    "30B-A3B": replace(_8B, dim=2048, n_layers=48, n_kv_heads=4, ffn_dim=6144, moe=_moe),
    "235B-A22B": replace(
        _8B, n_layers=94, n_heads=64, n_kv_heads=4, moe=replace(_moe, ffn_dim=1536)
    ),
}

_ATTENTION = "model.layers.{layer}.self_attn"
_WEIGHTS = (
    *DECODER_WEIGHTS,
    *KEY_VALUE_WEIGHTS,
    Rename("layers.{layer}.attention.q_norm.weight", f"{_ATTENTION}.q_norm.weight"),
    Rename("layers.{layer}.attention.k_norm.weight", f"{_ATTENTION}.k_norm.weight"),
)
_FIXED = DECODER_FIXED | {"use_sliding_window": False}
_SLIDING_WINDOW = ("sliding_window", "max_window_layers")  # of use_sliding_window

HF_FORMATS = (
    HFFormat(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        template=_8B,
        fields=DECODER_FIELDS | {"head_dim": Field("head_dim", default=128)},
        fixed=_FIXED,
        derived={"layer_types": lambda config: ["full_attention"] * config.n_layers},
        ignored=_SLIDING_WINDOW,
        weights=_WEIGHTS,
    ),
    HFFormat(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        template=FLAVORS["30B-A3B"],
        fields=DECODER_FIELDS
        | {
            "head_dim": Field("head_dim", default=lambda config: config.dim // config.n_heads),
            "num_experts": Field("moe.num_experts", default=128, aliases=("num_local_experts",)),
            "num_experts_per_tok": Field("moe.top_k", default=8),
            "moe_intermediate_size": Field("moe.ffn_dim", default=768),
            "norm_topk_prob": Field("moe.route_norm", default=False),
            "mlp_only_layers": Field(
                "n_dense_layers", default=(), decode=leading_layers, encode=lambda n: list(range(n))
            ),
        },
        fixed=_FIXED | {"decoder_sparse_step": 1},
        ignored=_SLIDING_WINDOW,
        weights=_WEIGHTS + EXPERT_WEIGHTS,
    ),
)
