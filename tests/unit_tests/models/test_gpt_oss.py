"""gpt-oss against transformers and published sizes."""

from dataclasses import replace

import pytest
import torch
from transformers import GptOssConfig as HFConfig
from transformers import GptOssForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.unit_tests.models.helpers import assert_equals_transformers, build
from torchtitan.models.gpt_oss import FLAVORS
from torchtitan.models.rope import rope_frequencies

HF_NAMES = {
    "attention.sinks.weight": "self_attn.sinks",
    "moe.router.gate": "mlp.router",
    "moe.experts.b13": "mlp.experts.gate_up_proj_bias",
    "moe.experts.b2": "mlp.experts.down_proj_bias",
}
AS_OURS = {
    "gate_up_proj": lambda w: w.unflatten(2, (-1, 2)).permute(0, 3, 2, 1),
    "gate_up_proj_bias": lambda b: b.unflatten(1, (-1, 2)).transpose(1, 2),
    "down_proj": lambda w: w.transpose(1, 2),
}


def hf_fields(config):
    scaling = config.rope_scaling
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.moe.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "sliding_window": config.sliding_window,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": scaling.factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
    }


def test_equals_transformers():
    """Four layers, so that each kind comes after the other; a window shorter than the sequence."""
    moe = replace(FLAVORS["20b"].moe, num_experts=8, ffn_dim=24)
    config = replace(FLAVORS["20b"], dim=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16)
    config = replace(config, moe=moe, sliding_window=5, vocab_size=64, seq_len=16)
    reference = GptOssForCausalLM(HFConfig(**hf_fields(config)))
    assert_equals_transformers(
        build(config), reference, config.vocab_size, HF_NAMES, as_ours=AS_OURS
    )


def test_positions_are_yarns_without_whole_channels():
    config = FLAVORS["20b"]
    ours = rope_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)
    theirs, magnitude = ROPE_INIT_FUNCTIONS["yarn"](HFConfig(**hf_fields(config)))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)
    assert config.rope_scaling.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize(("flavor", "billions"), [("20b", 20.91), ("120b", 116.83)])
def test_published_sizes(flavor, billions):
    with torch.device("meta"):
        model = FLAVORS[flavor].build()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.001)
