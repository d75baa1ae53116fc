"""Qwen3, dense and MoE, against transformers, published sizes and PyTorch's count of FLOPs."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config as HFConfig
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.unit_tests.models.helpers import assert_equals_transformers, build
from torchtitan.models.qwen3 import FLAVORS


def tiny(flavor, **changes):
    config = replace(FLAVORS[flavor], dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16)
    return replace(config, ffn_dim=48, vocab_size=64, seq_len=16, **changes)


def hf_fields(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.enable_weight_tying,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


@pytest.mark.parametrize("flavor", ["0.6B", "8B"])
def test_dense_equals_transformers(flavor):
    config = tiny(flavor)
    reference = Qwen3ForCausalLM(HFConfig(**hf_fields(config)))
    assert_equals_transformers(build(config), reference, config.vocab_size)


def test_moe_equals_transformers():
    moe = replace(FLAVORS["30B-A3B"].moe, num_experts=8, top_k=3, ffn_dim=24)
    config = tiny("30B-A3B", moe=moe)
    fields = {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    }
    reference = Qwen3MoeForCausalLM(Qwen3MoeConfig(**hf_fields(config), **fields))
    assert_equals_transformers(build(config), reference, config.vocab_size)


@pytest.mark.parametrize(
    ("flavor", "billions"),
    [
        ("0.6B", 0.596),
        ("1.7B", 1.72),
        ("4B", 4.02),
        ("8B", 8.19),
        ("14B", 14.77),
        ("32B", 32.76),
        ("30B-A3B", 30.53),
        ("235B-A22B", 235.09),
    ],
)
def test_published_sizes(flavor, billions):
    with torch.device("meta"):
        model = FLAVORS[flavor].build()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.002)
