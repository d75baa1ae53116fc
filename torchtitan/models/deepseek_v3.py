"""DeepSeek-V3 (arXiv 2412.19437) and V2: latent attention, and experts after the first layers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from torchtitan.config.faults import Fault
from torchtitan.models.decoder import DecoderConfig
from torchtitan.models.hf_format import (
    DECODER_FIELDS,
    DECODER_FIXED,
    DECODER_WEIGHTS,
    EXPERT_WEIGHTS,
    Field,
    HFFormat,
)
from torchtitan.models.mla import LatentAttention, LatentConfig
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.rope import YaRNScaling
from torchtitan.weight_map import Drop, Rename


@dataclass(frozen=True)
class DeepSeekV3Config(DecoderConfig):
    """A decoder with latent attention."""

    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: YaRNScaling | None = YaRNScaling(
        factor=40.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=1.0
    )
    max_seq_len: int = 163840
    latent: LatentConfig = LatentConfig()

    @property
    def rope_dim(self) -> int:
        return self.latent.qk_rope_head_dim

    def _shape_faults(self) -> Iterator[Fault]:
        yield from super()._shape_faults()
        if self.attn_type == "varlen":
            reason = "the varlen kernel takes keys and values of one width, and here they have two."
            yield Fault("model.overrides.attn_type", reason, "Use 'flex' or 'sdpa'.", "varlen")

    def _head_faults(self) -> Iterator[Fault]:
        if self.n_kv_heads != self.n_heads:
            reason = f"latent attention has as many key/value heads as query heads, {self.n_heads}."
            yield Fault("model.overrides.n_kv_heads", reason, value=self.n_kv_heads)
        if self.rope_dim % 2:
            reason = "channels are rotated in pairs."
            yield Fault("model.overrides.latent.qk_rope_head_dim", reason, value=self.rope_dim)

    def shrunk(self, tp: int) -> "DeepSeekV3Config":
        latent = LatentConfig(
            q_lora_rank=16 if self.latent.q_lora_rank else 0,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        )
        return replace(super().shrunk(tp), latent=latent)

    def attention_costs(self) -> tuple[int, int]:
        channels = self.n_heads * (self.latent.qk_head_dim + self.latent.v_head_dim)
        return self.latent.weights(self.dim, self.n_heads), channels

    def build_attention(self, layer_id: int, residual_std: float) -> nn.Module:
        return LatentAttention(
            self.dim,
            self.n_heads,
            self.latent,
            self.rope_scaling.score_factor if self.rope_scaling else 1.0,
            self.norm_eps,
            residual_std,
        )


# Step of the balance bias: DeepSeek-V3's, section 4.2; V2 balanced by auxiliary losses.
_V2_experts = MoEConfig(
    num_experts=64,
    top_k=6,
    ffn_dim=1408,
    num_shared_experts=2,
    router_in_fp32=True,
    num_scores_per_group=1,
    load_balance_coeff=0.001,
)
_V2_positions = YaRNScaling(
    factor=40.0, original_max_seq_len=4096, mscale=0.707, mscale_all_dim=0.707
)
_debugmodel = DeepSeekV3Config(
    dim=256,
    n_layers=6,
    n_heads=16,
    n_kv_heads=16,
    ffn_dim=1024,
    vocab_size=2048,
    rope_scaling=_V2_positions,
    n_dense_layers=1,
    moe=replace(_V2_experts, num_experts=8, top_k=3, ffn_dim=256),
)

# Sizes from the config.json files of DeepSeek-V2-Lite, DeepSeek-V2 and DeepSeek-V3.
FLAVORS: dict[str, DeepSeekV3Config] = {
    "debugmodel": _debugmodel,
    "debugmodel_flex_attn": replace(_debugmodel, attn_type="flex", attn_mask_type="block_causal"),
    "16B": replace(
        _debugmodel,
        dim=2048,
        n_layers=27,
        ffn_dim=10944,
        vocab_size=102400,
        moe=_V2_experts,
    ),
    "236B": replace(
        _debugmodel,
        dim=5120,
        n_layers=60,
        n_heads=128,
        n_kv_heads=128,
        ffn_dim=12288,
        vocab_size=102400,
        latent=LatentConfig(q_lora_rank=1536),
        moe=replace(
            _V2_experts,
            num_experts=160,
            ffn_dim=1536,
            route_scale=16.0,
            num_expert_groups=8,
            num_limited_groups=3,
        ),
    ),
    "671B": DeepSeekV3Config(
        dim=7168,
        n_layers=61,
        n_heads=128,
        n_kv_heads=128,
        ffn_dim=18432,
        vocab_size=129280,
        n_dense_layers=3,
        latent=LatentConfig(q_lora_rank=1536),
        moe=MoEConfig(
            num_experts=256,
            top_k=8,
            ffn_dim=2048,
            num_shared_experts=1,
            score_func="sigmoid",
            route_norm=True,
            route_scale=2.5,
            router_in_fp32=True,
            num_expert_groups=8,
            num_limited_groups=4,
            load_balance_coeff=0.001,
        ),
    ),
}

_LAYER, _ATTENTION = "model.layers.{layer}", "model.layers.{layer}.self_attn"
_SHARED = "model.layers.{layer}.mlp.shared_experts"
_WEIGHTS = (
    *DECODER_WEIGHTS,
    *EXPERT_WEIGHTS,
    Rename("layers.{layer}.attention.wq_a.weight", f"{_ATTENTION}.q_a_proj.weight"),
    Rename("layers.{layer}.attention.q_norm.weight", f"{_ATTENTION}.q_a_layernorm.weight"),
    Rename("layers.{layer}.attention.wq_b.weight", f"{_ATTENTION}.q_b_proj.weight"),
    Rename("layers.{layer}.attention.wkv_a.weight", f"{_ATTENTION}.kv_a_proj_with_mqa.weight"),
    Rename("layers.{layer}.attention.kv_norm.weight", f"{_ATTENTION}.kv_a_layernorm.weight"),
    Rename("layers.{layer}.attention.wkv_b.weight", f"{_ATTENTION}.kv_b_proj.weight"),
    Rename("layers.{layer}.moe.shared_experts.w1.weight", f"{_SHARED}.gate_proj.weight"),
    Rename("layers.{layer}.moe.shared_experts.w2.weight", f"{_SHARED}.down_proj.weight"),
    Rename("layers.{layer}.moe.shared_experts.w3.weight", f"{_SHARED}.up_proj.weight"),
)
_FIELDS = DECODER_FIELDS | {
    "kv_lora_rank": Field("latent.kv_lora_rank", default=512),
    "q_lora_rank": Field("latent.q_lora_rank", default=0, encode=lambda rank: rank or None),
    "qk_nope_head_dim": Field("latent.qk_nope_head_dim", default=128),
    "qk_rope_head_dim": Field("latent.qk_rope_head_dim", default=64),
    "v_head_dim": Field("latent.v_head_dim", default=128),
    "n_routed_experts": Field("moe.num_experts"),
    "n_shared_experts": Field("moe.num_shared_experts", default=0),
    "num_experts_per_tok": Field("moe.top_k"),
    "moe_intermediate_size": Field("moe.ffn_dim"),
    "routed_scaling_factor": Field("moe.route_scale", default=1.0),
    "first_k_dense_replace": Field("n_dense_layers", default=0),
}
_GROUPS = {
    "n_group": Field("moe.num_expert_groups", default=1),
    "topk_group": Field("moe.num_limited_groups", default=1),
}
_FIXED = DECODER_FIXED | {"moe_layer_freq": 1}
_DERIVED = {
    # transformers 5 takes the rotated channels for the head's width in code that families share.
    "head_dim": lambda config: config.latent.qk_rope_head_dim,
    "qk_head_dim": lambda config: config.latent.qk_head_dim,
}
_V2 = HFFormat(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    template=FLAVORS["16B"],
    fields=_FIELDS,
    fixed=_FIXED
    | {"topk_method": "greedy", "scoring_func": "softmax"}
    # transformers never normalises these models' scores.
    | {"norm_topk_prob": False, "mlp_bias": False},
    derived=_DERIVED,
    ignored=("n_group", "topk_group"),
    weights=_WEIGHTS,
)

HF_FORMATS = (
    HFFormat(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        template=FLAVORS["671B"],
        fields=_FIELDS | _GROUPS | {"norm_topk_prob": Field("moe.route_norm", default=True)},
        fixed=_FIXED
        | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_interleave": True},
        derived=_DERIVED,
        weights=(
            Rename("layers.{layer}.moe.expert_bias", f"{_LAYER}.mlp.gate.e_score_correction_bias"),
            *_WEIGHTS,
            Drop("model.layers.{extra_layer}.*", "predicts the token after the next"),
        ),
    ),
    _V2,
    replace(
        _V2,
        fields=_FIELDS | _GROUPS,
        fixed=_V2.fixed | {"topk_method": "group_limited_greedy"},
        ignored=(),
    ),
)
