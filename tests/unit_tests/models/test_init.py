"""How initial weights are spread: the numbers that each module declares, drawn."""

from dataclasses import replace

import pytest

from tests.unit_tests.models.helpers import build
from torchtitan.models import deepseek_v3, gpt_oss, llama3, qwen3

DIM, LAYERS = 128, 3
OF_TRUNCATED = 0.9866
"""What is left of a Gaussian's deviation that is cut off at three of them."""
ONES = ("norm.weight",)
FEED_FORWARD = ("feed_forward.w2.weight", "feed_forward.w3.weight")
RESIDUAL = ("attention.wo.weight", *FEED_FORWARD, "experts.w2", "experts.w2.weight", "experts.w3.weight")
ZEROS = (".bias", ".b13", ".b2")
MODELS = {
    "llama3": llama3.FLAVORS["debugmodel"],
    "llama3, tied": replace(llama3.FLAVORS["debugmodel"], enable_weight_tying=True),
    "qwen3": qwen3.FLAVORS["debugmodel_moe"],
    "deepseek_v3": deepseek_v3.FLAVORS["debugmodel"],
    "gpt_oss": gpt_oss.FLAVORS["debugmodel"],
}


def deviation(name, tied):
    """(standard deviation, the largest value in units of it or None) that a weight is drawn with."""
    if name == "tok_embeddings.weight":
        return (DIM**-0.5, 3) if tied else (1.0, None)
    if name == "output.weight":
        return DIM**-0.5, 3
    if name.endswith("sinks.weight"):
        return 0.02, None
    if name.endswith(RESIDUAL):
        # Each layer's share of the residual stream becomes smaller with depth.
        return 0.02 / (2 * (int(name.split(".")[1]) + 1)) ** 0.5, 3
    return 0.02, 3


def small(name, n_layers):
    config = replace(MODELS[name], dim=DIM, n_layers=n_layers, vocab_size=512, seq_len=8)
    return replace(config, moe=config.moe and replace(config.moe, num_experts=4, top_k=2))


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_spread_as_declared(name):
    config = small(name, LAYERS)
    seen = set()
    for key, weight in build(config).named_parameters():
        if key.endswith((*ONES, *ZEROS)):
            assert (weight == float(key.endswith(ONES))).all(), key
            continue
        std, cutoff = deviation(key, config.enable_weight_tying)
        size = OF_TRUNCATED * std if cutoff else std
        tolerance = 4 / (2 * weight.numel()) ** 0.5  # four deviations of what is measured
        assert weight.std().item() == pytest.approx(size, rel=tolerance), key
        assert weight.mean().abs() < 4 * std / weight.numel() ** 0.5, key
        if cutoff:
            assert weight.abs().max() <= cutoff * std * (1 + 1e-6), key
        seen.add(std)
    assert len(seen) >= LAYERS + 2


def test_experts_differ():
    w2 = build(small("qwen3", 1)).layers["0"].moe.experts.w2
    assert len({expert.sum().item() for expert in w2}) == len(w2)
