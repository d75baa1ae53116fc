"""Training with experts in low precision: losses stay near those of high precision."""

import pytest

from tests.distributed_tests.test_training import run

STEPS = 100
SMALL = {
    "model.name": "qwen3",
    "model.flavor": "debugmodel_moe",
    "model.overrides.moe.num_experts": 8,
    "model.overrides.moe.top_k": 2,
    "model.overrides.moe.ffn_dim": 32,
    "model.overrides.head_dim": 16,
    "training.seq_len": 64,
    "training.local_batch_size": 12,
    "training.steps": STEPS,
    "optimizer.lr": 4e-3,
    "lr_scheduler.warmup_steps": 10,
    "metrics.log_freq": 10,
}
FLOAT8 = {
    "model.converters": "quantize.grouped_mm.float8",
    "quantize.grouped_mm.float8.fqns": "experts",
    "quantize.grouped_mm.float8.emulate": True,
}
RECIPES = {
    "rowwise": FLOAT8,
    "rowwise_with_gw_hp": FLOAT8 | {"quantize.grouped_mm.float8.recipe_name": "rowwise_with_gw_hp"},
    "mxfp8": {
        "model.converters": "quantize.grouped_mm.mx",
        "quantize.grouped_mm.mx.fqns": "experts",
        "quantize.grouped_mm.mx.recipe_name": "mxfp8_emulated",
    },
}


def losses(folder, **changes):
    found, *_ = run(folder, **SMALL | changes)
    return [found[step]["loss"] for step in sorted(found)]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("exact"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_stay_within_a_band(exact, recipe, tmp_path):
    found = losses(tmp_path, **RECIPES[recipe])
    assert found != exact and exact[-1] < 0.8 * exact[0]
    for mine, theirs in zip(found, exact, strict=True):
        assert abs(mine - theirs) < 0.005 * theirs  # seen: 0.0013
