"""The decoder's arithmetic, on one process, against Hugging Face's Llama and by itself."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.unit_tests.models.helpers import assert_equals_transformers, build
from torchtitan.data.batch import IGNORE_INDEX
from torchtitan.models.init import parameter_inits
from torchtitan.models.llama3 import FLAVORS
from torchtitan.models.rope import rope_frequencies, rope_table


def tiny(**changes):
    base = replace(FLAVORS["debugmodel"], dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64)
    return replace(base, vocab_size=64, seq_len=16, **changes)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients_equal_transformers(tied):
    config = tiny(enable_weight_tying=tied)
    model = build(config)
    scaling = config.rope_scaling
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=tied,
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": config.rope_theta,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            },
        )
    )
    assert_equals_transformers(model, reference, vocab_size=64)


def test_the_last_position_is_as_exact_as_the_first():
    """Angles reach 131071 radians, of which fp32 would leave but two digits behind the point."""
    config = FLAVORS["8B"]
    positions = config.rope_dim, config.rope_theta, config.rope_scaling
    table = rope_table(*positions, config.max_seq_len, torch.device("cpu"))
    angles = (config.max_seq_len - 1) * rope_frequencies(*positions)
    exact = torch.stack([angles.cos(), angles.sin()])
    assert table.dtype == torch.float32 and (table[-1] - exact).abs().max() < 1e-7


def test_ignored_labels_count_nothing():
    model = build(tiny())
    tokens = torch.randint(64, (1, 16))
    labels = torch.randint(64, (1, 16))
    masked = labels.clone()
    masked[:, 8:] = IGNORE_INDEX
    kept = torch.nn.functional.cross_entropy(model(tokens)[0, :8], labels[0, :8], reduction="sum")
    torch.testing.assert_close(model(tokens, masked), kept)
    assert model(tokens, torch.full_like(labels, IGNORE_INDEX)).item() == 0.0


@pytest.mark.parametrize(
    ("flavor", "billions"), [("1B", 1.24), ("3B", 3.21), ("8B", 8.03), ("70B", 70.6), ("405B", 405.9)]
)
def test_published_sizes(flavor, billions):
    with torch.device("meta"):
        model = FLAVORS[flavor].build()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)


def test_initial_weights_depend_on_seed_and_name_only():
    first, second = build(tiny(n_layers=2)), build(tiny(n_layers=3))
    shared = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, shared[name]), name
    other = build(tiny(n_layers=2), seed=1)
    assert not torch.equal(first.layers["0"].attention.wq.weight, other.layers["0"].attention.wq.weight)
    wq = [layer.attention.wq.weight for layer in first.layers.values()]
    assert not torch.equal(*wq)


def test_every_parameter_needs_an_init():
    model = build(tiny())
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="extra.weight"):
        parameter_inits(model)
