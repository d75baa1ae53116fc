"""Llama 3 (arXiv 2407.21783): flavors of the shared decoder."""

from dataclasses import replace

from torchtitan.models.decoder import DecoderConfig
from torchtitan.models.hf_format import (
    DECODER_FIELDS,
    DECODER_FIXED,
    DECODER_WEIGHTS,
    KEY_VALUE_WEIGHTS,
    HFFormat,
)
from torchtitan.models.rope import RoPEScaling

_debugmodel = DecoderConfig(
    dim=256,
    n_layers=6,
    n_heads=16,
    n_kv_heads=16,
    ffn_dim=768,
    vocab_size=2048,
    rope_scaling=RoPEScaling(),
)
_8B = DecoderConfig(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    ffn_dim=14336,
    vocab_size=128256,
    rope_scaling=RoPEScaling(),
)
# Llama 3.2: its config.json files state a RoPE factor of 32 and tied embeddings.
_1B = replace(
    _8B,
    dim=2048,
    n_layers=16,
    ffn_dim=8192,
    rope_scaling=RoPEScaling(factor=32.0),
    enable_weight_tying=True,
)

FLAVORS: dict[str, DecoderConfig] = {
    "debugmodel": _debugmodel,
    "debugmodel_flex_attn": replace(_debugmodel, attn_type="flex", attn_mask_type="block_causal"),
    "debugmodel_varlen_attn": replace(
        _debugmodel, attn_type="varlen", attn_mask_type="block_causal"
    ),
    "1B": _1B,
    "3B": replace(_1B, dim=3072, n_layers=28, n_heads=24),
    "8B": _8B,
    "8B_flex": replace(_8B, attn_type="flex", attn_mask_type="block_causal"),
    "8B_varlen": replace(_8B, attn_type="varlen", attn_mask_type="block_causal"),
    "70B": replace(_8B, dim=8192, n_layers=80, n_heads=64, ffn_dim=28672),
    "405B": replace(_8B, dim=16384, n_layers=126, n_heads=128, ffn_dim=53248),
}

HF_FORMATS = (
    HFFormat(
        model_type="llama",
        architecture="LlamaForCausalLM",
        template=_8B,
        fields=DECODER_FIELDS,
        fixed=DECODER_FIXED | {"mlp_bias": False},
        derived={"head_dim": lambda config: config.head_dim},
        weights=DECODER_WEIGHTS + KEY_VALUE_WEIGHTS,
    ),
)
