"""What a run tells of its experts: equal to a count by hand, and the same on every layout."""

import math
import re
from pathlib import Path

import pytest
import torch

from tests.distributed_tests.test_training import COMMON, TENSOR, VALIDATION, build, records, run
from torchtitan.distributed.launch import run_ranks
from torchtitan.models.deepseek_v3 import FLAVORS
from torchtitan.trainer import Trainer

EXPERT = "parallelism.expert_parallel_degree"
MOE = {
    "model.name": "deepseek_v3",
    "model.flavor": "debugmodel",
    "model.overrides.moe.num_experts": 8,
    "model.overrides.moe.ffn_dim": 16,
    "moe.global_balance_coeff": 1e-2,
    "training.steps": 3,
}
LAYOUTS = {
    "fsdp2": (2, {}),
    "ep2": (2, {EXPERT: 2}),
    "tp2 ep2, no sp": (2, {TENSOR: 2, EXPERT: 2, "parallelism.no_enable_sequence_parallel": True}),
    "fsdp2 x tp2, ep4, accumulate": (4, {TENSOR: 2, EXPERT: 4, "training.local_batch_size": 3}),
}
BY_RANK = ("max_rank_load", "received_mib")
"""Statistics that hang on the layout."""


def count(settings):
    """Statistics of the last step by what the routers chose in it; state beside counts of all steps."""
    trainer = build(settings, Trainer)
    router = trainer.model.parts[0].layers["1"].moe.router
    router.record = []
    trainer.run()
    tokens = settings["training.global_batch_size"] * settings["training.seq_len"]
    of_steps = [ids.flatten().bincount(minlength=8) for ids in torch.cat(router.record).split(tokens)]
    counts = of_steps[-1].tolist()
    shares = [n / sum(counts) for n in counts if n]
    moe = trainer.model.parts[0].layers["1"].moe
    assert moe.sequences_per_step == settings["training.global_batch_size"]
    return {
        "max_expert_load": max(counts) / (sum(counts) / 8),
        "max_rank_load": 1.0,
        "entropy": -sum(share * math.log(share) for share in shares) / math.log(8),
        "unused_experts": counts.count(0),
        "bias_norm": moe.expert_bias.norm().item(),
    }, counts, (moe.expert_bias, moe.previous_load, of_steps)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    settings = COMMON | MOE | {"job.dump_folder": folder, "training.local_batch_size": 12}
    [(statistics, counts, steps)] = run_ranks(count, 1, settings)
    return statistics, counts, records(folder), steps


def test_one_process_tells_what_its_routers_chose(expected):
    statistics, _, found, _ = expected
    for name, value in statistics.items():
        assert found[3][f"moe/layers.1/{name}"] == pytest.approx(value, rel=1e-6), name
    assert not any("layers.0" in key for key in found[3])  # a dense layer


def test_each_step_moves_biases_up_where_an_expert_had_too_few_tokens(expected):
    """By 0.001, the flavor's coefficient: experts with the mean stay."""
    *_, (bias, previous_load, of_steps) = expected
    moves = [0.001 * (counts.double().mean() - counts).sign() for counts in of_steps]
    assert len(moves) == 3 and bias.tolist() == pytest.approx(sum(moves).tolist(), abs=1e-9)
    assert torch.equal(previous_load, of_steps[-1])  # what the next step's loss on balance is of


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_tells_the_same(expected, tmp_path, name):
    _, counts, reference, _ = expected
    world_size, changes = LAYOUTS[name]
    found, *_ = run(tmp_path, world_size, **MOE, **changes)
    for step, record in reference.items():
        for key, value in record.items():
            if key.startswith("moe/") and not key.endswith(BY_RANK):
                assert found[step][key] == pytest.approx(value, rel=1e-9), (step, key)
    ep = changes.get(EXPERT, 1)
    loads = [sum(counts[i : i + 8 // ep]) for i in range(0, 8, 8 // ep)]
    assert found[3]["moe/layers.1/max_rank_load"] == pytest.approx(max(loads) * ep / sum(counts))
    assert ("moe/layers.1/received_mib" in found[3]) == (ep > 1)


def totals(settings):
    """Choices counted in the last step, by layer."""
    trainer = build(settings, Trainer)
    trainer.run()
    return trainer.expert_load.counts.sum(1).tolist()


@pytest.mark.parametrize("mode", [("full", "2"), ("selective", "op")], ids=str)
def test_a_recomputation_counts_no_token_again(mode, tmp_path):
    """Statistics are relative and biases follow signs: neither shows a count that is doubled."""
    options = dict(zip(("activation_checkpoint.mode", "activation_checkpoint.selective_ac_option"), mode))
    run_of_one = {"job.dump_folder": tmp_path, "training.local_batch_size": 12, "training.steps": 1}
    [found] = run_ranks(totals, 1, COMMON | MOE | options | run_of_one)
    top_k = FLAVORS["debugmodel"].moe.top_k
    assert found == [COMMON["training.global_batch_size"] * COMMON["training.seq_len"] * top_k]


def test_validation_is_not_counted_and_training_counts_on_after_it(expected, tmp_path):
    """Tokens that are only looked at move no balance bias, and so no later loss."""
    changes = {"training.local_batch_size": 12, "validation.freq": 1, "validation.steps": 1}
    found, *_ = run(tmp_path, **MOE | VALIDATION | changes)
    for step, record in expected[2].items():
        for key, value in record.items():
            if key == "loss" or key.startswith("moe/"):
                assert found[step][key] == value, (step, key)


def test_the_rows_that_a_rank_receives_are_told(tmp_path):
    """With forced balance each rank gets half of the rows of a microbatch: 1 x 32 tokens x 2 ranks."""
    forced = {EXPERT: 2, "debug.moe_force_load_balance": True, "model.overrides.moe.top_k": 2}
    found, *_ = run(tmp_path, 2, **MOE | forced)
    assert found[2]["moe/layers.1/received_mib"] == 32 * 2 * 2 // 2 * COMMON["model.overrides.dim"] * 4 / 2**20


def test_every_statistic_is_documented(expected):
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"`moe/<layer>/(\w+)`", text))
    names = {key.rpartition("/")[2] for key in expected[2][3] if key.startswith("moe/")}
    assert names | {"received_mib"} == documented
