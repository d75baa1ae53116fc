"""DeepSeek-V3 and V2 against transformers and published sizes."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers import DeepseekV3Config as HFConfig
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.unit_tests.models.helpers import assert_equals_transformers, build
from torchtitan.models.deepseek_v3 import FLAVORS
from torchtitan.models.mla import LatentConfig
from torchtitan.models.rope import YaRNScaling, rope_frequencies

HF_NAMES = {
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
}


def tiny(flavor, q_lora_rank, **moe_changes):
    latent = LatentConfig(
        q_lora_rank=q_lora_rank,
        kv_lora_rank=20,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
    )
    config = replace(FLAVORS[flavor], dim=32, n_layers=3, n_heads=4, n_kv_heads=4, ffn_dim=48)
    moe = replace(config.moe, ffn_dim=24, **moe_changes)
    return replace(
        config, n_dense_layers=1, vocab_size=64, seq_len=16, latent=latent, moe=moe
    )


def hf_fields(config):
    latent, moe, scaling = config.latent, config.moe, config.rope_scaling
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "q_lora_rank": latent.q_lora_rank or None,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_dim,
        "routed_scaling_factor": moe.route_scale,
        "norm_topk_prob": moe.route_norm,
        "n_group": moe.num_expert_groups,
        "topk_group": moe.num_limited_groups,
        "first_k_dense_replace": config.n_dense_layers,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": scaling.factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
    }


@pytest.mark.parametrize(("q_lora_rank", "mscale"), [(0, 1.0), (24, 1.0), (24, 0.5)])
def test_v3_equals_transformers(q_lora_rank, mscale):
    """Published models have one mscale: then nothing shows which of the two scores are scaled by."""
    config = tiny(
        "671B", q_lora_rank, num_experts=16, top_k=3, num_expert_groups=4, num_limited_groups=2
    )
    config = replace(config, rope_scaling=replace(config.rope_scaling, mscale=mscale))
    reference = DeepseekV3ForCausalLM(HFConfig(**hf_fields(config)))
    model = build(config)
    biases = torch.randn(config.n_layers, 16, generator=torch.Generator().manual_seed(1)) / 10
    for layer in range(config.n_dense_layers, config.n_layers):
        model.layers[str(layer)].moe.expert_bias.copy_(biases[layer])
        gate = reference.model.layers[layer].mlp.gate
        gate.e_score_correction_bias.copy_(biases[layer])
    assert_equals_transformers(model, reference, config.vocab_size, HF_NAMES)


@pytest.mark.parametrize(("flavor", "q_lora_rank"), [("16B", 0), ("236B", 24)])
def test_v2_equals_transformers(flavor, q_lora_rank):
    config = tiny(flavor, q_lora_rank, num_experts=16, top_k=3)
    method = "group_limited_greedy" if config.moe.num_expert_groups > 1 else "greedy"
    reference = DeepseekV2ForCausalLM(
        DeepseekV2Config(**hf_fields(config), topk_method=method)
    )
    assert_equals_transformers(build(config), reference, config.vocab_size, HF_NAMES)


@pytest.mark.parametrize("flavor", ["16B", "671B"])
def test_positions_are_yarns(flavor):
    """Full widths, where the blend of short and long wavelengths has many steps."""
    config = FLAVORS[flavor]
    ours = rope_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)
    theirs, magnitude = ROPE_INIT_FUNCTIONS["yarn"](HFConfig(**hf_fields(config)))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)
    assert config.rope_scaling.magnitude == magnitude == 1.0


@pytest.mark.parametrize(("theta", "original"), [(1e4, 128), (1e2, 4096)], ids=["first", "last"])
def test_a_ramp_that_would_go_beyond_the_channels_is_theirs(theta, original):
    """No published model has one: its first channel turns often, and its last seldom."""
    scaling = YaRNScaling(factor=8.0, original_max_seq_len=original, mscale_all_dim=1.0)
    config = replace(FLAVORS["671B"], rope_theta=theta, rope_scaling=scaling)
    ours = rope_frequencies(config.rope_dim, theta, scaling)
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](HFConfig(**hf_fields(config)))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mscale_all_dim", [0.0, 0.4])
def test_yarns_magnitude_where_scores_do_not_take_it_over(mscale_all_dim):
    scaling = YaRNScaling(factor=32.0, original_max_seq_len=4096, mscale_all_dim=mscale_all_dim)
    config = replace(FLAVORS["671B"], rope_scaling=scaling)
    _, magnitude = ROPE_INIT_FUNCTIONS["yarn"](HFConfig(**hf_fields(config)))
    assert scaling.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize(
    ("flavor", "billions"), [("16B", 15.71), ("236B", 235.74), ("671B", 671.03)]
)
def test_published_sizes(flavor, billions):
    with torch.device("meta"):
        model = FLAVORS[flavor].build()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.001)
