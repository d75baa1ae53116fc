"""Runs that earlier versions began still go on here: their config.toml, checkpoints and data positions.

tests/golden/runs has one for each format of checkpoints: two steps of a run on two ranks, and what its
next two steps came to where it was not stopped. None is ever made anew: a change that cannot go on from
them needs a new format, and a reader of the old one.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed_tests.test_training import build, records
from torchtitan.checkpoint import storage
from torchtitan.distributed.launch import run_ranks
from torchtitan.trainer import Trainer

RUNS = Path(__file__).parents[1] / "golden" / "runs"


def resume(settings):
    build(settings, Trainer).run()


@pytest.mark.parametrize("name", [f"format_{number}" for number in range(1, storage.FORMAT + 1)])
def test_an_earlier_run_goes_on(name, tmp_path):
    shutil.copytree(RUNS / name / "checkpoint", tmp_path / "checkpoint")
    settings = {"job.config_file": RUNS / name / "config.toml", "job.dump_folder": tmp_path}
    run_ranks(resume, 2, settings)
    expected = json.loads((RUNS / name / "losses.json").read_text())
    found = records(tmp_path)
    assert list(map(str, found)) == list(expected)
    for step, values in expected.items():
        assert {key: found[int(step)][key] for key in values} == pytest.approx(values, rel=1e-5)
