"""OLMo 2 against transformers and published sizes."""

from dataclasses import replace

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from tests.unit_tests.models.helpers import assert_equals_transformers, build
from torchtitan.models.olmo2 import FLAVORS

HF_NAMES = {
    "attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_feedforward_layernorm",
}


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_equals_transformers(kv_heads):
    config = replace(FLAVORS["7B"], dim=32, n_layers=2, n_heads=4, n_kv_heads=kv_heads)
    config = replace(config, ffn_dim=48, vocab_size=64, seq_len=16)
    reference = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            pad_token_id=None,  # its embedding would get no gradient
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    assert_equals_transformers(build(config), reference, config.vocab_size, HF_NAMES)


@pytest.mark.parametrize(
    ("flavor", "billions"), [("1B", 1.485), ("7B", 7.299), ("13B", 13.716), ("32B", 32.234)]
)
def test_published_sizes(flavor, billions):
    with torch.device("meta"):
        model = FLAVORS[flavor].build()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.001)
