"""OLMo 2 (arXiv 2501.00656): norms after attention and feed-forward, and over all heads at once."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from torchtitan.models.attention import Attention
from torchtitan.models.attention_mask import AttentionMask
from torchtitan.models.decoder import DecoderConfig, TransformerBlock
from torchtitan.models.hf_format import (
    DECODER_FIELDS,
    DECODER_FIXED,
    DECODER_WEIGHTS,
    KEY_VALUE_WEIGHTS,
    HFFormat,
)
from torchtitan.models.init import Constant
from torchtitan.sharding import Fragment, Style
from torchtitan.weight_map import Rename


@dataclass(frozen=True)
class Olmo2Config(DecoderConfig):
    """A decoder that normalises what its layers add, not what they read."""

    norm_eps: float = 1e-6
    max_seq_len: int = 4096

    def build_attention(self, layer_id: int, residual_std: float) -> nn.Module:
        return NormedAttention(
            self.dim, self.n_heads, self.n_kv_heads, self.head_dim, residual_std, self.norm_eps
        )

    def build_block(self, layer_id: int) -> TransformerBlock:
        return PostNormBlock(self, layer_id)


class NormedAttention(Attention):
    """Attention whose queries and keys are normalised, all heads together."""

    fragment: Fragment = {
        **Attention.fragment,
        "q_norm": Style.NORM_COLWISE,
        "k_norm": Style.NORM_COLWISE,
    }

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
        self.q_norm = nn.RMSNorm(n_heads * head_dim, eps=norm_eps)
        self.k_norm = nn.RMSNorm(n_kv_heads * head_dim, eps=norm_eps)
        self.inits |= {"q_norm.weight": Constant(1.0), "k_norm.weight": Constant(1.0)}

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        return q, k, v


class PostNormBlock(TransformerBlock):
    """Attention, then feed-forward, each followed by its norm."""

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        x = x + self.attention_norm(self.attention(x, rope, mask))
        return x + self.ffn_norm(self.feed_forward(x))


# Sizes from the config.json files of allenai/OLMo-2-0425-1B, -1124-7B, -1124-13B and -0325-32B.
_7B = Olmo2Config(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11008, vocab_size=100352
)

FLAVORS: dict[str, Olmo2Config] = {
    "debugmodel": replace(
        _7B, dim=256, n_layers=6, n_heads=16, n_kv_heads=8, ffn_dim=768, vocab_size=2048
    ),
    "1B": replace(_7B, dim=2048, n_layers=16, n_heads=16, n_kv_heads=16, ffn_dim=8192),
    "7B": _7B,
    "13B": replace(_7B, dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13824),
    "32B": replace(_7B, dim=5120, n_layers=64, n_heads=40, n_kv_heads=8, ffn_dim=27648),
}

_LAYER = "model.layers.{layer}"

HF_FORMATS = (
    HFFormat(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        template=_7B,
        fields=DECODER_FIELDS,
        fixed=DECODER_FIXED,
        derived={"head_dim": lambda config: config.head_dim},
        weights=(
            Rename("layers.{layer}.attention_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
            Rename("layers.{layer}.ffn_norm.weight", f"{_LAYER}.post_feedforward_layernorm.weight"),
            Rename("layers.{layer}.attention.q_norm.weight", f"{_LAYER}.self_attn.q_norm.weight"),
            Rename("layers.{layer}.attention.k_norm.weight", f"{_LAYER}.self_attn.k_norm.weight"),
            *DECODER_WEIGHTS,  # of two rules for one tensor the first counts
            *KEY_VALUE_WEIGHTS,
        ),
    ),
)
