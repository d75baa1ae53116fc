"""What a user of run_train.sh meets: help, mistakes, exit statuses, signals, ranks that stop."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration_tests.run_tests import CONFIG_FILE, LAUNCHER_VARIABLES, REPO
from torchtitan import launcher, preflight

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
ENVIRONMENT |= {"VIRTUAL_ENV": sys.prefix, "CONFIG_FILE": str(CONFIG_FILE)}
TRAIN_TIMEOUT_SECONDS = 5


def _start(*args: str, cwd: Path = REPO, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [REPO / "run_train.sh", *args],
        env=ENVIRONMENT | environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(*args: str, cwd: Path = REPO, **environment: str) -> tuple[int, str]:
    process = _start(*args, cwd=cwd, **environment)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def test_help_starts_nothing():
    status, output = _run("--help", NGPU="2")
    assert status == 0
    assert "NGPU" in output
    assert "--training.seq_len" in output


@pytest.mark.parametrize("ngpu", ["1", "2"])
def test_a_wrong_config_is_one_clear_message(ngpu):
    status, output = _run("--training.stepz=3", "--training.seq_len=-1", NGPU=ngpu)
    assert status == 2
    assert "Did you mean training.steps?" in output
    assert "Traceback" not in output


def test_the_callers_config_file_is_found_from_anywhere(tmp_path):
    (tmp_path / "mine.toml").write_text(CONFIG_FILE.read_text() + "\n[job]\nmisspelt = 1\n")
    status, output = _run(cwd=tmp_path, CONFIG_FILE="mine.toml", NGPU="1")
    assert (status, "job.misspelt" in output) == (2, True), output


def test_compiled_code_is_kept_at_home_where_that_can_be_written_to(tmp_path):
    """Else, and where the user names a folder, it stays as it is: empty is torch's own choice."""
    (tmp_path / "tells.py").write_text("import os; print('[', os.environ['TORCHINDUCTOR_CACHE_DIR'], ']')")
    (tmp_path / "file").touch()
    module = {"PYTHONPATH": str(tmp_path), "TRAIN_FILE": "tells", "NGPU": "1"}
    for home, named, expected in (
        (tmp_path, "", tmp_path / ".cache/torchtitan/compiled"),
        (tmp_path / "file", "", ""),
        (tmp_path, "elsewhere", "elsewhere"),
    ):
        status, output = _run(**module, HOME=str(home), TORCHINDUCTOR_CACHE_DIR=named)
        assert (status, f"[ {expected} ]" in output) == (0, True), output


@pytest.mark.parametrize("name", ["NGPU", "NNODES"])
@pytest.mark.parametrize("value", ["abc", "0", "-1", "1:2"])
def test_counts_that_are_none_are_refused(name, value):
    status, output = _run(**{"NGPU": "1", name: value})
    assert (status, output) == (2, f"{name} = {value}: must be a whole number, at least 1.\n")


@pytest.mark.parametrize(
    "endpoint, words",
    [("", "set RDZV_ENDPOINT=host:port"), ("nowhere.invalid:29500", "nowhere.invalid:29500, where 2 machines are to meet")],
)
def test_several_nodes_need_a_place_to_meet(endpoint, words):
    batch = "--training.local_batch_size=6"
    status, output = _run(batch, NNODES="2", NGPU="1", RDZV_ENDPOINT=endpoint)
    assert (status, words in output) == (2, True), output


@pytest.mark.parametrize("option, status", [("--optimizer.lr=8e-4", 0), ("--optimizer.lr=8e-3", 2)])
def test_machines_train_together_where_they_were_started_alike(tmp_path, option, status):
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    common = [f"--job.dump_folder={tmp_path}", "--training.steps=2", "--training.local_batch_size=1"]
    machines = [
        _start(*common, *own, NNODES="2", NGPU="1", RDZV_ENDPOINT=endpoint) for own in ([], [option])
    ]
    outputs = [machine.communicate(timeout=60)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [status] * 2, outputs
    said = f"differs between ranks: it is 0.008 on {socket.gethostname()} (rank 1)"
    assert [said in output for output in outputs] == [status == 2] * 2, outputs


@pytest.mark.parametrize("ngpu", ["1", "2"])
def test_the_status_of_a_rank_is_the_status_of_the_run(tmp_path, ngpu):
    (tmp_path / "ends_with_75.py").write_text(
        "import os, sys, time\n"
        "if int(os.environ['RANK']) == int(os.environ['WORLD_SIZE']) - 1:\n"
        "    sys.exit('last words' if os.environ.get('WORDS') else 75)\n"
        "time.sleep(60)\n"
    )
    module = {"PYTHONPATH": str(tmp_path), "TRAIN_FILE": "ends_with_75", "NGPU": ngpu}
    assert _run(**module)[0] == 75
    status, output = _run(**module, WORDS="1")  # of a rank whose output is not shown
    assert (status, "last words" in output) == (1, True), output
    assert "machines" not in output


@pytest.mark.parametrize(("status", "num_starts"), [(75, 1), (1, 3)])
def test_a_run_that_has_saved_is_not_started_again_by_torchrun(tmp_path, status, num_starts):
    """PET_MAX_RESTARTS is for failures; status 75 is the caller's to answer."""
    starts = tmp_path / "starts"
    (tmp_path / "ends.py").write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] != '0':\n"
        "    time.sleep(60)\n"
        f"open({str(starts)!r}, 'a').write('x')\n"
        f"sys.exit({status})\n"
    )
    module = {"PYTHONPATH": str(tmp_path), "TRAIN_FILE": "ends", "NGPU": "2"}
    found, output = _run(**module, PET_MAX_RESTARTS="2")
    assert (found, len(starts.read_text())) == (status, num_starts), output


def test_the_launcher_itself_touches_no_gpu(monkeypatch):
    """The check picks a GPU, and so takes some of its memory, in a process that ends."""
    checked_in = multiprocessing.Value("i")
    monkeypatch.setattr(preflight, "main", lambda argv: setattr(checked_in, "value", os.getpid()) or 2)
    assert launcher.main(["-m", "torchtitan.train"]) == 2
    assert checked_in.value not in (0, os.getpid())


@pytest.mark.parametrize(
    "ngpu, ranks_stopped, status, words",
    [
        (1, None, 128 + signal.SIGTERM, None),
        (2, None, 128 + signal.SIGTERM, "told to end (SIGTERM) at step"),
        (2, (1, signal.SIGKILL), 1, "rank 1 has been silent for"),
        (2, (1, signal.SIGSTOP), 1, "rank 1 has been silent for"),
        (2, (0, signal.SIGKILL), 1, "rank 0 has been silent for"),
    ],
)
def test_a_run_that_is_stopped_ends_whole_and_in_time(
    request, tmp_path, ngpu, ranks_stopped, status, words
):
    """The trainer itself: the rank is named with step and phase within the timeout plus 10 s."""
    endless = ["--training.steps=100000", f"--job.dump_folder={tmp_path}"]
    timeout = f"--comm.train_timeout_seconds={TRAIN_TIMEOUT_SECONDS}"
    batch = "--training.local_batch_size=6"
    run = _start(*endless, timeout, batch, "--metrics.log_freq=1", NGPU=str(ngpu))
    request.addfinalizer(lambda: _kill(run, tmp_path))
    _wait_for_step(tmp_path / "metrics.jsonl", 3, run)
    ranks = _ranks(tmp_path)
    stopped_at = time.time()
    if ranks_stopped is None:
        run.send_signal(signal.SIGTERM)
    else:
        rank, number = ranks_stopped
        os.kill(ranks[rank], number)
    output = run.communicate(timeout=TRAIN_TIMEOUT_SECONDS + 40)[0]
    assert (1 if run.returncode == 1 else abs(run.returncode) % 128 + 128) == status, output
    assert time.time() - stopped_at < TRAIN_TIMEOUT_SECONDS + 20
    assert not _ranks(tmp_path)
    if words:
        assert words in output
    if ranks_stopped:
        report = tmp_path / "failure.txt"
        assert report.stat().st_mtime - stopped_at < TRAIN_TIMEOUT_SECONDS + 10
        [step] = re.findall(
            r"last seen at step (\d+), phase \w+", report.read_text().splitlines()[0]
        )
        assert int(step) >= 3


@pytest.mark.parametrize("ngpu", [1, 2])
def test_ctrl_c_ends_a_run_with_one_line_that_says_how_to_go_on(request, tmp_path, ngpu):
    folder = f"--job.dump_folder={tmp_path}"
    options = ["--training.steps=100000", "--training.local_batch_size=6", "--checkpoint.enable"]
    workers = ["--checkpoint.interval=2", "--training.dataloader.num_workers=1"]
    run = _start(folder, *options, *workers, NGPU=str(ngpu))
    request.addfinalizer(lambda: _kill(run, tmp_path))
    _wait_for_step(tmp_path / "metrics.jsonl", 3, run)
    run.send_signal(signal.SIGINT)
    output = run.communicate(timeout=30)[0]
    assert run.returncode == 130, output
    saved = max(int(path.name[5:]) for path in (tmp_path / "checkpoint").glob("step-?"))
    last = output.splitlines()[-1]
    assert re.search(r"interrupted \(SIGINT\) at step \d+, phase \w+", last), output
    assert last.endswith(f"the same command goes on from {tmp_path}/checkpoint/step-{saved}"), output
    assert (output.count("interrupted"), "Traceback" in output) == (1, False), output
    assert not _ranks(tmp_path)


def test_a_second_ctrl_c_waits_for_nobody(request, tmp_path):
    batch = "--training.local_batch_size=6"
    run = _start("--training.steps=100000", batch, f"--job.dump_folder={tmp_path}", NGPU="2")
    request.addfinalizer(lambda: _kill(run, tmp_path))
    _wait_for_step(tmp_path / "metrics.jsonl", 1, run)
    os.kill(_ranks(tmp_path)[1], signal.SIGSTOP)  # for its answer the first one waits
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.5)
    output = run.communicate(timeout=2)[0]
    assert (run.returncode, "Traceback" in output) == (130, False), output
    assert not _ranks(tmp_path)


@pytest.mark.parametrize("ngpu", [1, 2])
def test_ctrl_c_before_training_is_no_traceback(request, tmp_path, ngpu):
    run = _start(f"--job.dump_folder={tmp_path}", "--training.local_batch_size=6", NGPU=str(ngpu))
    request.addfinalizer(lambda: _kill(run, tmp_path))
    deadline = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():  # it is imported, for seconds
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    output = run.communicate(timeout=30)[0]
    assert (run.returncode, output) == (-signal.SIGINT, "")


def _kill(run: subprocess.Popen, dump_folder: Path) -> None:
    """Leave nothing of a run that a failed test did not see end."""
    for process in (run.pid, *_ranks(dump_folder).values()):
        if run.poll() is None or process != run.pid:
            os.kill(process, signal.SIGKILL)


def _wait_for_step(metrics: Path, step: int, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()[0]
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if any(json.loads(line)["step"] >= step for line in lines):
            return
        time.sleep(0.2)
    raise AssertionError(f"no step {step} within 90 s")


def _ranks(dump_folder: Path) -> dict[int, int]:
    """Process ids by rank of the training processes that write to this folder."""
    ranks = {}
    # Oldest first: a loader's worker looks like the rank that it belongs to.
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            command = (process / "cmdline").read_text()
            if str(dump_folder) not in command or "torchtitan.train\0" not in command:
                continue
            environment = (process / "environ").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        for value in (v for v in environment if v.startswith("RANK=")):
            ranks.setdefault(int(value[5:]), int(process.name))
    return ranks
