"""What `[debug]` promises of whole runs: two have the same bits, and no batch changes a sequence's."""

import os

import pytest
import tomli
import torch

from tests.distributed_tests.test_training import (
    COMMON,
    EXPERTS,
    PP2,
    RecordingTrainer,
    build,
    by_step,
    records,
    run,
)
from torchtitan.config.schema import Debug
from torchtitan.distributed.launch import run_ranks
from torchtitan.reproducibility import arithmetic, make_deterministic

EP2 = EXPERTS | {"parallelism.expert_parallel_degree": 2}
COMPILED = {"compile.enable": True, "compile.backend": "aot_eager"}
PACKED = {"model.flavor": "debugmodel_varlen_attn", "activation_checkpoint.mode": "full"}
DEBUG = {"debug.deterministic": True, "training.steps": 3}
DETERMINISTIC = {
    "dense, compiled": (2, COMPILED),
    "packed documents": (1, PACKED),
    "experts": (1, EXPERTS | COMPILED),
    "experts on two ranks": (2, EP2),
    "pipeline": (2, PP2),
}


def train_deterministically(settings):
    """The last weights of a run. Fresh memory is full of NaN, as PyTorch has it in this mode."""
    make_deterministic(Debug(deterministic=True))
    assert torch.empty(3).isnan().all()
    trainer = build(settings, RecordingTrainer)
    trainer.run()
    return trainer.final


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_two_runs_have_the_same_bits(tmp_path, name):
    world_size, changes = DETERMINISTIC[name]
    runs = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        settings = COMMON | changes | DEBUG | {"job.dump_folder": folder}
        runs.append((run_ranks(train_deterministically, world_size, settings, timeout=120), records(folder)))
    (weights, curve), (other_weights, other_curve) = runs
    for ours, theirs in zip(weights, other_weights, strict=True):
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in curve.values()] == [r[key] for r in other_curve.values()]


def test_a_seed_that_was_drawn_is_written_down_and_repeats_the_run(tmp_path):
    """On two ranks: one that drew a seed of its own would have other weights and other data."""
    one_step = {"training.steps": 1}
    seeds, curves = [], []
    for folder, seed in (("first", "None"), ("second", "None"), ("again", None)):
        seed = seeds[0] if seed is None else seed
        curve, *_ = run(tmp_path / folder, 2, **one_step, **{"debug.seed": seed})
        seeds.append(tomli.loads((tmp_path / folder / "config.toml").read_text())["debug"]["seed"])
        curves.append(curve[1]["loss"])
    first, second, again = zip(seeds, curves)
    assert first == again and second[0] != first[0] and second[1] != first[1]


def settings_in_effect(debug):
    make_deterministic(debug)
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE")
    return enabled, warns, *map(os.environ.get, names), torch._inductor.config.deterministic


@pytest.mark.parametrize(
    ("debug", "expected"),
    [
        (Debug(), (False, False, "mine", None, False)),
        (Debug(deterministic=True), (True, False, "mine", "0", True)),
        (
            Debug(deterministic=True, deterministic_warn_only=True),
            (True, True, "mine", "0", True),
        ),
    ],
)
def test_the_keys_reach_torch_and_leave_the_users_environment(monkeypatch, debug, expected):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "mine")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    assert run_ranks(settings_in_effect, 1, debug) == [expected]


def logits(settings, rows):
    """This rank's logits of its rows of ten short sequences, by a trainer's model."""
    trainer = build(settings, RecordingTrainer)
    tokens = torch.randint(2048, (10, 5), generator=torch.Generator().manual_seed(0))
    part = rows[trainer.world.rank]
    with torch.no_grad(), arithmetic(trainer.config.debug):
        [model] = trainer.model.parts
        return model(tokens[part])


WIDE = {"model.overrides.dim": 96, "model.overrides.moe.ffn_dim": 200}
"""So that products change with the number of rows."""
LAYOUTS = {
    "one at a time": (1, {}, [slice(3, 4)]),
    "experts on two ranks": (2, {"parallelism.expert_parallel_degree": 2}, [slice(0, 7), slice(3, 10)]),
    "two ranks": (2, {}, [slice(9, 10), slice(2, 6)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_layout_and_no_batch_changes_a_sequences_logits(tmp_path, name):
    """Experts get other rows beside a sequence's, also those of other ranks."""
    settings = COMMON | EXPERTS | WIDE | {"job.dump_folder": tmp_path, "debug.batch_invariant": True}
    [expected] = run_ranks(logits, 1, settings, [slice(0, 10)])
    world_size, changes, rows = LAYOUTS[name]
    for part, ours in zip(rows, run_ranks(logits, world_size, settings | changes, rows), strict=True):
        assert torch.equal(ours, expected[part])


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(1, EXPERTS | {"activation_checkpoint.mode": "full"}), (2, PP2)],
    ids=["experts, recomputed", "pipeline"],
)
def test_batch_invariant_runs_train_and_validate_as_others(tmp_path, world_size, changes):
    validation = {
        "validation.enable": True,
        "validation.dataset": "c4_test_validation",
        "validation.seq_len": 32,
        "validation.steps": 1,
        "training.steps": 2,
    }
    found = []
    for debug in ({}, {"debug.batch_invariant": True}):
        folder = tmp_path / str(len(found))
        settings = COMMON | changes | validation | {"job.dump_folder": folder} | debug
        run_ranks(train, world_size, settings)
        curve = [(r["loss"], r["grad_norm"]) for r in records(folder).values()]
        found.append([*curve, *((r["validation_loss"],) for r in by_step(folder).values())])
    for plain, invariant in zip(*found, strict=True):
        assert invariant == pytest.approx(plain, rel=1e-5)


def train(settings):
    build(settings, RecordingTrainer).run()
