"""gpt-oss (arXiv 2508.10925): attention sinks, a sliding window in every second layer, biases."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
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
from torchtitan.models.init import Init, Normal
from torchtitan.models.limits import size_faults
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.rope import YaRNScaling, apply_rope
from torchtitan.sharding import Fragment, Style
from torchtitan.weight_map import Permute, Rename


@dataclass(frozen=True)
class GptOssConfig(WideHeadsConfig):
    """A decoder whose even layers see a window only."""

    rope_theta: float = 150_000.0
    rope_scaling: YaRNScaling | None = YaRNScaling(
        factor=32.0, original_max_seq_len=4096, truncate=False
    )
    head_dim: int = 64
    sliding_window: int = 128
    """How many tokens the layers 0, 2, 4, ... see, the token itself included."""

    def attention_pattern(self, layer_id: int) -> Pattern:
        return Pattern() if layer_id % 2 else Pattern(window=self.sliding_window)

    def _size_faults(self) -> Iterator[Fault]:
        yield from super()._size_faults()
        yield from size_faults("model.overrides", {"sliding_window": self.sliding_window})

    def _shape_faults(self) -> Iterator[Fault]:
        yield from super()._shape_faults()
        if self.attn_type == "varlen":
            reason = "the varlen kernel gives no gradient to attention sinks."
            yield Fault("model.overrides.attn_type", reason, "Use 'flex' or 'sdpa'.", "varlen")

    def shrunk(self, tp: int) -> "GptOssConfig":
        return replace(super().shrunk(tp), sliding_window=4)

    def build_attention(self, layer_id: int, residual_std: float) -> nn.Module:
        return SinkAttention(self.dim, self.n_heads, self.n_kv_heads, self.head_dim, residual_std)


class Sinks(nn.Module):
    """A score for each head, of a key that every token sees and whose value is zero."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads))
        self.inits: dict[str, Init] = {"weight": Normal(0.02)}


class SinkAttention(Attention):
    """Attention with biases, which need not attend to any token."""

    fragment: Fragment = {**Attention.fragment, "sinks": Style.HEADS_COLWISE}

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, residual_std: float
    ):
        super().__init__(dim, n_heads, n_kv_heads, head_dim, residual_std, bias=True)
        self.sinks = Sinks(n_heads)

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        q, k, v = self.heads(x)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        out = self.core(q, k, v, mask, sinks=self.sinks.weight)
        return self.wo(out.flatten(-2))


_experts = MoEConfig(
    num_experts=32,
    top_k=4,
    ffn_dim=2880,
    activation="gpt_oss",
    experts_bias=True,
    score_chosen_only=True,
    router_bias=True,
)
# Sizes from the config.json files of openai/gpt-oss-20b and gpt-oss-120b.
_20b = GptOssConfig(
    dim=2880,
    n_layers=24,
    n_heads=64,
    n_kv_heads=8,
    ffn_dim=0,
    vocab_size=201088,
    moe=_experts,
    attn_type="flex",
)

FLAVORS: dict[str, GptOssConfig] = {
    "debugmodel": replace(
        _20b,
        dim=256,
        n_layers=4,
        n_heads=16,
        head_dim=32,
        vocab_size=2048,
        moe=replace(_experts, num_experts=8, ffn_dim=256),
    ),
    "20b": _20b,
    "120b": replace(_20b, n_layers=36, moe=replace(_experts, num_experts=128)),
}

_ATTENTION, _MLP = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
_EXPERTS = "layers.{layer}.moe.experts"

HF_FORMATS = (
    HFFormat(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        template=_20b,
        fields=DECODER_FIELDS
        | {
            "intermediate_size": Field("moe.ffn_dim"),
            "head_dim": Field("head_dim", default=64),
            "sliding_window": Field("sliding_window", default=128),
            "num_local_experts": Field("moe.num_experts", aliases=("num_experts",)),
            "num_experts_per_tok": Field("moe.top_k", default=4, aliases=("experts_per_token",)),
        },
        fixed=DECODER_FIXED | {"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        derived={
            "layer_types": lambda config: [
                "full_attention" if layer_id % 2 else "sliding_attention"
                for layer_id in range(config.n_layers)
            ]
        },
        ignored=("initial_context_length", "experts_per_token"),  # said again elsewhere
        weights=(
            *DECODER_WEIGHTS,
            *KEY_VALUE_WEIGHTS,
            Rename("layers.{layer}.attention.wq.bias", f"{_ATTENTION}.q_proj.bias"),
            Rename("layers.{layer}.attention.wk.bias", f"{_ATTENTION}.k_proj.bias"),
            Rename("layers.{layer}.attention.wv.bias", f"{_ATTENTION}.v_proj.bias"),
            Rename("layers.{layer}.attention.wo.bias", f"{_ATTENTION}.o_proj.bias"),
            Rename("layers.{layer}.attention.sinks.weight", f"{_ATTENTION}.sinks"),
            Rename("layers.{layer}.moe.router.gate.weight", f"{_MLP}.router.weight"),
            Rename("layers.{layer}.moe.router.gate.bias", f"{_MLP}.router.bias"),
            # Gate and up alternate.
            Permute(f"{_EXPERTS}.w13", f"{_MLP}.experts.gate_up_proj", "e d (f p) -> e p f d"),
            Permute(f"{_EXPERTS}.b13", f"{_MLP}.experts.gate_up_proj_bias", "e (f p) -> e p f"),
            Permute(f"{_EXPERTS}.w2", f"{_MLP}.experts.down_proj", "e f d -> e d f"),
            Rename(f"{_EXPERTS}.b2", f"{_MLP}.experts.down_proj_bias"),
        ),
    ),
)
