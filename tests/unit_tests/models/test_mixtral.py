"""Mixtral against transformers and published sizes."""

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.unit_tests.models.helpers import assert_equals_transformers, build
from torchtitan.models.mixtral import FLAVORS


def test_equals_transformers():
    moe = replace(FLAVORS["8x7B"].moe, ffn_dim=24)
    config = replace(FLAVORS["8x7B"], dim=32, n_layers=2, n_heads=4, n_kv_heads=2, moe=moe)
    config = replace(config, vocab_size=64, seq_len=16)
    reference = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    assert_equals_transformers(build(config), reference, config.vocab_size)


@pytest.mark.parametrize(("flavor", "billions"), [("8x7B", 46.70), ("8x22B", 140.62)])
def test_published_sizes(flavor, billions):
    with torch.device("meta"):
        model = FLAVORS[flavor].build()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.001)
