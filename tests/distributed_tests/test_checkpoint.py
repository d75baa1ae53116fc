"""Which checkpoints are kept, found and refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from torchtitan.checkpoint.manager import (
    CheckpointManager,
    find_checkpoint,
    read_progress,
    saved_steps,
)
from torchtitan.config.faults import ConfigError
from torchtitan.config.schema import Checkpoint, Optimizer
from torchtitan.distributed.launch import run_ranks
from torchtitan.optim.optimizer import build_optimizer, state_by_name

ENABLED = Checkpoint(enable=True)
ASSETS = Path("tests/assets/tokenizer")


def manager(folder, value, **options):
    """A manager of one weight and its moments, all of them `value`."""
    model = nn.Linear(2, 2, bias=False)
    state = state_by_name(build_optimizer(model.named_parameters(), Optimizer()))
    with torch.no_grad():
        for tensor in (model.weight, state["weight"]["exp_avg"]):
            tensor.fill_(value)
    return CheckpointManager(Checkpoint(enable=True, **options), folder, model, state)


def values(m):
    return m.model.weight.mean().item(), m.optimizer_state["weight"]["exp_avg"].mean().item()


def save(folder, steps, last=None, **options):
    for step in steps:
        m = manager(folder, float(step), **options)
        m.save(step, {"seed": 1}, last=step == last)


def load(folder, checkpoint, **options):
    m = manager(folder, 0.0, **options)
    m.load(checkpoint)
    return values(m)


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    run_ranks(save, 1, tmp_path, [2, 10, 4])
    folder = tmp_path / "checkpoint"
    (folder / "step-30.tmp").mkdir()  # an interrupted save
    (folder / "step-20").mkdir()  # not ours: no progress.json
    assert saved_steps(folder) == [2, 4, 10]
    newest = find_checkpoint(ENABLED, tmp_path, ASSETS)
    assert newest == folder / "step-10"
    assert read_progress(newest) == {"seed": 1, "step": 10, "model_only": False}
    assert run_ranks(load, 1, tmp_path, newest) == [(10.0, 10.0)]
    assert find_checkpoint(Checkpoint(enable=True, load_step=4), tmp_path, ASSETS) == folder / "step-4"
    assert find_checkpoint(Checkpoint(enable=False), tmp_path, ASSETS) is None


def test_a_missing_step_is_refused_with_the_nearest(tmp_path):
    run_ranks(save, 1, tmp_path, [2, 4])
    with pytest.raises(ConfigError, match=r"load_step = 5: no such checkpoint.*Nearest: 2, 4"):
        find_checkpoint(Checkpoint(enable=True, load_step=5), tmp_path, ASSETS)


def test_an_initial_load_path_is_used_until_the_run_has_its_own(tmp_path):
    run_ranks(save, 1, tmp_path / "first", [3])
    source = tmp_path / "first" / "checkpoint" / "step-3"
    config = Checkpoint(enable=True, initial_load_path=str(source))
    assert find_checkpoint(config, tmp_path / "second", ASSETS) == source
    assert run_ranks(load, 1, tmp_path / "second", source) == [(3.0, 0.0)]  # the model only
    run_ranks(save, 1, tmp_path / "second", [1])
    assert find_checkpoint(config, tmp_path / "second", ASSETS).name == "step-1"
    broken = Checkpoint(enable=True, initial_load_path=str(tmp_path))
    with pytest.raises(ConfigError, match="not a complete checkpoint"):
        find_checkpoint(broken, tmp_path / "third", ASSETS)


@pytest.mark.parametrize(("keep", "left"), [(2, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_old_checkpoints_are_removed(tmp_path, keep, left):
    save_all = {"keep_latest_k": keep}
    run_ranks(save_with, 1, tmp_path, [1, 2, 3, 4, 5], save_all)
    assert saved_steps(tmp_path / "checkpoint") == left


def save_with(folder, steps, options):
    save(folder, steps, **options)


def save_last(folder):
    save(folder, [7], last=7, export_dtype="bfloat16")


def load_excluding(folder, checkpoint):
    return load(folder, checkpoint, exclude_from_loading=["optimizer"])


def test_the_last_save_holds_the_weights_alone(tmp_path):
    run_ranks(save_last, 1, tmp_path)
    last = tmp_path / "checkpoint" / "step-7"
    assert read_progress(last)["model_only"]
    assert run_ranks(load, 1, tmp_path, last) == [(7.0, 0.0)]


def test_the_optimizer_can_be_excluded(tmp_path):
    run_ranks(save, 1, tmp_path, [2])
    newest = find_checkpoint(ENABLED, tmp_path, ASSETS)
    assert run_ranks(load_excluding, 1, tmp_path, newest) == [(2.0, 0.0)]


@pytest.mark.parametrize(
    ("step", "last", "options", "expected"),
    [
        (1, False, {}, False),
        (1, False, {"enable_first_step_checkpoint": True}, True),
        (500, False, {}, True),
        (7, True, {}, True),
        (500, True, {"load_only": True}, False),
        (500, True, {"enable": False}, False),
    ],
)
def test_when_a_checkpoint_is_saved(step, last, options, expected):
    config = Checkpoint(**({"enable": True} | options))
    assert CheckpointManager(config, Path(), nn.Linear(1, 1), {}).wants_save(step, last) is expected
