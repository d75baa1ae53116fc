"""Llama 4's text models against transformers and published sizes."""

from dataclasses import replace

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.unit_tests.models.helpers import assert_equals_transformers, build
from torchtitan.models.llama4 import FLAVORS
from torchtitan.models.rope import rope_frequencies

HF_NAMES = {
    "feed_forward.w1": "feed_forward.gate_proj",
    "feed_forward.w2": "feed_forward.down_proj",
    "feed_forward.w3": "feed_forward.up_proj",
    "moe.router.gate": "feed_forward.router",
    "moe.experts.w13": "feed_forward.experts.gate_up_proj",
    "moe.experts.w2": "feed_forward.experts.down_proj",
    "moe.shared_experts.w1": "feed_forward.shared_expert.gate_proj",
    "moe.shared_experts.w2": "feed_forward.shared_expert.down_proj",
    "moe.shared_experts.w3": "feed_forward.shared_expert.up_proj",
}
AS_OURS = {
    "experts.gate_up_proj": lambda w: w.unflatten(2, (2, -1)).permute(0, 2, 3, 1),
    "experts.down_proj": lambda w: w.transpose(1, 2),
}


def hf_fields(config):
    scaling = config.rope_scaling
    positions = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        positions |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.moe.ffn_dim,
        "intermediate_size_mlp": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "interleave_moe_layer_step": config.moe_interval,
        "no_rope_layer_interval": config.nope_interval,
        "attention_chunk_size": config.attention_chunk,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.attn_temperature_tuning,
        "floor_scale": config.floor_scale,
        "attn_scale": config.attn_scale,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": positions,
    }


def tiny(flavor, **changes):
    """Four layers, all there are kinds of; chunks and temperature steps within the sequence."""
    config = replace(FLAVORS[flavor], dim=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8)
    moe = replace(config.moe, num_experts=4, ffn_dim=24)
    return replace(config, moe=moe, ffn_dim=40, vocab_size=64, seq_len=16, **changes)


@pytest.mark.parametrize("flavor", ["17bx16e_irope", "17bx128e_irope"])
def test_equals_transformers(flavor):
    config = tiny(flavor, attention_chunk=5, floor_scale=4)
    reference = Llama4ForCausalLM(Llama4TextConfig(**hf_fields(config)))
    assert_equals_transformers(
        build(config), reference, config.vocab_size, HF_NAMES, as_ours=AS_OURS
    )


def test_flavors_without_irope_rotate_in_every_layer_and_see_all():
    """Which transformers can be told layer by layer."""
    config = tiny("17bx128e")
    layers = {"no_rope_layers": [1] * 4, "layer_types": ["full_attention"] * 4}
    unused = {"no_rope_layer_interval": 4, "attention_chunk_size": 8192}
    reference = Llama4ForCausalLM(Llama4TextConfig(**hf_fields(config) | layers | unused))
    assert_equals_transformers(
        build(config), reference, config.vocab_size, HF_NAMES, as_ours=AS_OURS
    )


def test_positions_are_stretched_at_one_wavelength():
    """16e's frequencies have no blend between those that stay and those that are stretched."""
    config = FLAVORS["17bx16e_irope"]
    ours = rope_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](Llama4TextConfig(**hf_fields(config)))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)


# Text only: the vision encoder's 0.9 billion of the published 109 and 402 are not in it.
@pytest.mark.parametrize(("flavor", "billions"), [("17bx16e", 107.77), ("17bx128e", 400.71)])
def test_published_sizes(flavor, billions):
    for name in (flavor, f"{flavor}_irope"):
        with torch.device("meta"):
            model = FLAVORS[name].build()
        count = sum(p.numel() for p in model.parameters()) / 1e9
        assert count == pytest.approx(billions, rel=0.001)
