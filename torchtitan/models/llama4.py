"""Llama 4, its text models: one expert a token beside a shared one, and `_irope` flavors.

In `_irope` flavors, the models as published, layers with rotated positions see chunks of a document,
and every fourth layer sees all of it and knows no positions (arXiv 2305.19466).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.config.faults import Fault
from torchtitan.models.attention import Attention
from torchtitan.models.attention_mask import AttentionMask, Pattern
from torchtitan.models.decoder import WideHeadsConfig
from torchtitan.models.hf_format import (
    DECODER_FIELDS,
    DECODER_FIXED,
    DECODER_WEIGHTS,
    KEY_VALUE_WEIGHTS,
    Field,
    HFFormat,
)
from torchtitan.models.limits import size_faults
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.rope import RoPEScaling, apply_rope, apply_rope_to_neighbours
from torchtitan.weight_map import Permute, Rename


@dataclass(frozen=True)
class Llama4Config(WideHeadsConfig):
    """A decoder whose layers take turns: dense and experts, with positions and without."""

    moe_interval: int = 1
    """Every so many layers, the last one has experts."""
    nope_interval: int = 0
    """Every so many layers, the last one has no positions; 0: all have them."""
    attention_chunk: int = 0
    """Layers with positions see chunks of so many tokens; 0: the whole document."""
    qk_norm: bool = False
    """Rotated queries and keys are normalised, without a weight."""
    attn_temperature_tuning: bool = True
    """In layers without positions queries grow with their position (arXiv 2501.19399)."""
    floor_scale: int = 8192
    """They grow by a step after every so many tokens."""
    attn_scale: float = 0.1
    """Factor on the logarithm of one plus the number of steps."""

    def _size_faults(self) -> Iterator[Fault]:
        sizes = {"moe_interval": self.moe_interval, "floor_scale": self.floor_scale}
        optional = {"nope_interval": self.nope_interval, "attention_chunk": self.attention_chunk}
        sizes |= {name: size for name, size in optional.items() if size}
        # Without intervals nobody can say which layers there are.
        yield from list(size_faults("model.overrides", sizes)) or super()._size_faults()

    @property
    def position_channels(self) -> int:
        return super().position_channels + bool(self.nope_interval)

    def position_table(self, device: torch.device) -> torch.Tensor:
        """With a last column for layers without: a rotation by nothing, times what queries grow by."""
        table = super().position_table(device)
        if not self.nope_interval:
            return table
        growth = torch.ones(self.seq_len, dtype=torch.float64, device="cpu")
        if self.attn_temperature_tuning:
            steps = torch.arange(1, self.seq_len + 1, device="cpu") // self.floor_scale
            growth += self.attn_scale * steps.log1p()
        column = torch.stack([growth, torch.zeros_like(growth)], dim=1).unsqueeze(-1)
        return torch.cat([table, column.to(table)], dim=-1)

    def is_moe_layer(self, layer_id: int) -> bool:
        return (layer_id + 1) % self.moe_interval == 0

    def has_positions(self, layer_id: int) -> bool:
        """Whether a layer's queries and keys are rotated."""
        return not self.nope_interval or (layer_id + 1) % self.nope_interval != 0

    def attention_pattern(self, layer_id: int) -> Pattern:
        chunked = self.attention_chunk and self.has_positions(layer_id)
        return Pattern(chunk=self.attention_chunk) if chunked else Pattern()

    def shrunk(self, tp: int) -> "Llama4Config":
        small = replace(super().shrunk(tp), moe_interval=min(self.moe_interval, 2), floor_scale=4)
        if self.nope_interval:
            small = replace(small, n_layers=4, nope_interval=4)
        return replace(small, attention_chunk=6 if self.attention_chunk else 0)

    def build_attention(self, layer_id: int, residual_std: float) -> nn.Module:
        sizes = (self.dim, self.n_heads, self.n_kv_heads, self.head_dim, residual_std)
        if not self.has_positions(layer_id):
            return PositionlessAttention(*sizes)
        norm_eps = self.norm_eps if self.qk_norm else None
        return RotatedAttention(*sizes, norm_eps)


class RotatedAttention(Attention):
    """Attention that rotates pairs of neighbouring channels; with `norm_eps`, normalised after."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        residual_std: float,
        norm_eps: float | None,
    ):
        super().__init__(dim, n_heads, n_kv_heads, head_dim, residual_std)
        self.norm_eps = norm_eps

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        q, k, v = self.heads(x)
        angles = rope[..., : self.head_dim // 2]
        q, k = (apply_rope_to_neighbours(y, angles) for y in (q, k))
        if self.norm_eps is not None:
            q, k = (F.rms_norm(y, y.shape[-1:], eps=self.norm_eps) for y in (q, k))
        return self.wo(self.core(q, k, v, mask).flatten(-2))


class PositionlessAttention(Attention):
    """Attention that knows no order but what its mask tells; later queries are larger."""

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        q, k, v = self.heads(x)
        return self.wo(self.core(apply_rope(q, rope[..., -1:]), k, v, mask).flatten(-2))


_experts = MoEConfig(
    num_experts=16,
    top_k=1,
    ffn_dim=8192,
    num_shared_experts=1,
    score_func="sigmoid",
    score_chosen_only=True,
    score_before_experts=True,
)
# Sizes from the config.json files of meta-llama/Llama-4-Scout-17B-16E-Instruct and
# Llama-4-Maverick-17B-128E-Instruct.
_17bx16e = Llama4Config(
    dim=5120,
    n_layers=48,
    n_heads=40,
    n_kv_heads=8,
    ffn_dim=16384,
    vocab_size=202048,
    moe=_experts,
    max_seq_len=10485760,
)
_17bx128e = replace(
    _17bx16e, moe=replace(_experts, num_experts=128), moe_interval=2, max_seq_len=1048576
)
_debugmodel = replace(
    _17bx16e,
    dim=256,
    n_layers=6,
    n_heads=16,
    head_dim=16,
    ffn_dim=768,
    vocab_size=2048,
    moe=replace(_experts, num_experts=8, ffn_dim=256),
    moe_interval=2,
)


def _irope(config: Llama4Config, attention_chunk: int = 8192, **changes) -> Llama4Config:
    """Attention as published."""
    return replace(
        config,
        nope_interval=4,
        attention_chunk=attention_chunk,
        attn_type="flex",
        attn_mask_type="block_causal",
        **changes,
    )


FLAVORS: dict[str, Llama4Config] = {
    "debugmodel": _debugmodel,
    "debugmodel_irope": _irope(_debugmodel, attention_chunk=128, qk_norm=True, floor_scale=64),
    "17bx16e": _17bx16e,
    "17bx16e_irope": _irope(
        _17bx16e,
        qk_norm=True,
        rope_scaling=RoPEScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
    ),
    "17bx128e": _17bx128e,
    "17bx128e_irope": _irope(_17bx128e),
}

_FFN = "model.layers.{layer}.feed_forward"

HF_FORMATS = (
    HFFormat(
        model_type="llama4_text",
        architecture="Llama4ForCausalLM",
        template=FLAVORS["17bx16e_irope"],
        fields=DECODER_FIELDS
        | {
            "intermediate_size": Field("moe.ffn_dim"),
            "intermediate_size_mlp": Field("ffn_dim", default=16384),
            "head_dim": Field("head_dim", default=128),
            "num_local_experts": Field("moe.num_experts", default=16),
            "num_experts_per_tok": Field("moe.top_k", default=1),
            "interleave_moe_layer_step": Field("moe_interval", default=1),
            # Of flavors that are not `_irope` theirs has none: these come back as other models.
            "no_rope_layer_interval": Field("nope_interval", default=4, encode=lambda n: n or 4),
            "attention_chunk_size": Field(
                "attention_chunk", default=8192, encode=lambda n: n or 8192
            ),
            "use_qk_norm": Field("qk_norm", default=True),
            "attn_temperature_tuning": Field(
                "attn_temperature_tuning", default=True, decode=bool
            ),
            "floor_scale": Field("floor_scale", default=8192),
            "attn_scale": Field("attn_scale", default=0.1),
        },
        fixed=DECODER_FIXED | {"router_jitter_noise": 0.0},
        derived={
            "moe_layers": lambda config: [
                layer_id for layer_id in range(config.n_layers) if config.is_moe_layer(layer_id)
            ],
            "no_rope_layers": lambda config: [
                int(config.has_positions(layer_id)) for layer_id in range(config.n_layers)
            ],
            "layer_types": lambda config: [
                "chunked_attention" if config.has_positions(layer_id) else "full_attention"
                for layer_id in range(config.n_layers)
            ],
        },
        weights=(
            Rename("layers.{layer}.feed_forward.w1.weight", f"{_FFN}.gate_proj.weight"),
            Rename("layers.{layer}.feed_forward.w2.weight", f"{_FFN}.down_proj.weight"),
            Rename("layers.{layer}.feed_forward.w3.weight", f"{_FFN}.up_proj.weight"),
            *DECODER_WEIGHTS,  # of two rules for one tensor the first counts
            *KEY_VALUE_WEIGHTS,
            Rename("layers.{layer}.moe.router.gate.weight", f"{_FFN}.router.weight"),
            Permute(
                "layers.{layer}.moe.experts.w13",
                f"{_FFN}.experts.gate_up_proj",
                "e d (p f) -> e p f d",
            ),
            Permute(
                "layers.{layer}.moe.experts.w2", f"{_FFN}.experts.down_proj", "e f d -> e d f"
            ),
            *(
                Rename(
                    f"layers.{{layer}}.moe.shared_experts.{ours}.weight",
                    f"{_FFN}.shared_expert.{theirs}.weight",
                )
                for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
            ),
        ),
    ),
)
