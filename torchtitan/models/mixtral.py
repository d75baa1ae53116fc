"""Mixtral (arXiv 2401.04088): the shared decoder with 8 experts in every layer."""

from dataclasses import replace

from torchtitan.models.decoder import DecoderConfig
from torchtitan.models.hf_format import (
    DECODER_FIELDS,
    DECODER_FIXED,
    DECODER_WEIGHTS,
    KEY_VALUE_WEIGHTS,
    Field,
    HFFormat,
)
from torchtitan.models.moe.config import MoEConfig
from torchtitan.weight_map import Rename, Stack

_experts = MoEConfig(num_experts=8, top_k=2, ffn_dim=14336, route_norm=True)

# Sizes from the config.json files of mistralai/Mixtral-8x7B-v0.1 and Mixtral-8x22B-v0.1.
_8x7B = DecoderConfig(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    ffn_dim=0,
    vocab_size=32000,
    moe=_experts,
    rope_theta=1_000_000.0,
    max_seq_len=32768,
)

FLAVORS: dict[str, DecoderConfig] = {
    "debugmodel": replace(
        _8x7B,
        dim=256,
        n_layers=6,
        n_heads=16,
        vocab_size=2048,
        moe=replace(_experts, ffn_dim=256),
    ),
    "8x7B": _8x7B,
    "8x22B": replace(
        _8x7B,
        dim=6144,
        n_layers=56,
        n_heads=48,
        moe=replace(_experts, ffn_dim=16384),
        max_seq_len=65536,
    ),
}

_MOE = "model.layers.{layer}.block_sparse_moe"

HF_FORMATS = (
    HFFormat(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        template=_8x7B,
        fields=DECODER_FIELDS
        | {
            "intermediate_size": Field("moe.ffn_dim"),
            "num_local_experts": Field("moe.num_experts", default=8, aliases=("num_experts",)),
            "num_experts_per_tok": Field("moe.top_k", default=2),
        },
        fixed=DECODER_FIXED | {"sliding_window": None, "router_jitter_noise": 0.0},
        derived={"head_dim": lambda config: config.head_dim},
        weights=(
            *DECODER_WEIGHTS,
            *KEY_VALUE_WEIGHTS,
            Rename("layers.{layer}.moe.router.gate.weight", f"{_MOE}.gate.weight"),
            Stack(
                "layers.{layer}.moe.experts.w13",
                (f"{_MOE}.experts.{{expert}}.w1.weight", f"{_MOE}.experts.{{expert}}.w3.weight"),
            ),
            Stack("layers.{layer}.moe.experts.w2", (f"{_MOE}.experts.{{expert}}.w2.weight",)),
        ),
    ),
)
