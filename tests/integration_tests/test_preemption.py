"""A run of run_train.sh that is told to stop: status 75, and the same command goes on."""

import json
import os
import signal

import pytest

from tests.integration_tests.test_run_train import _kill, _ranks, _run, _start, _wait_for_step

STEPS = 40


def _arguments(folder):
    return [
        f"--job.dump_folder={folder}",
        "--checkpoint.enable",
        "--checkpoint.async_mode=async",
        "--checkpoint.interval=5",
        f"--training.steps={STEPS}",
        "--training.local_batch_size=6",
        "--training.dataloader.num_workers=1",
        "--model.overrides.n_layers=1",
        "--metrics.log_freq=1",
    ]


@pytest.mark.parametrize(
    ("ngpu", "whom", "number"),
    [
        (1, "launcher", signal.SIGUSR1),  # the one rank itself
        (2, "launcher", signal.SIGTERM),
        (2, "launcher", signal.SIGUSR1),
        (2, "rank 1", signal.SIGTERM),
    ],
)
def test_told_to_stop_it_saves_and_asks_to_be_started_again(request, tmp_path, ngpu, whom, number):
    run = _start(*_arguments(tmp_path), NGPU=str(ngpu))
    request.addfinalizer(lambda: _kill(run, tmp_path))
    _wait_for_step(tmp_path / "metrics.jsonl", 3, run)
    os.kill(run.pid if whom == "launcher" else _ranks(tmp_path)[1], number)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 75, output
    assert "start the run again to go on" in output
    assert not _ranks(tmp_path)
    saved = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]["step"]
    assert last < STEPS and f"step-{last}" in saved
    if (ngpu, whom) == (2, "rank 1"):
        status, output = _run(*_arguments(tmp_path), NGPU="2")
        assert status == 0, output
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
