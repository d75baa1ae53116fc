"""Is the rank that stops a run named in time, with its step and phase, and do all processes end?"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed_tests.stuck_run import BAD_STEP, TIMEOUT_SECONDS
from torchtitan.distributed.comm import World
from torchtitan.observability.rank_report import RankState, judge, render
from torchtitan.observability.watchdog import Watchdog, _Patrol

REPO = Path(__file__).parents[2]


def _launch(dump_folder: Path, bad_rank: int, misdeed: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torchtitan.launcher", "--nproc-per-node", "3"]
    shown = ["--local-ranks-filter", "0", "--tee", "3", "--rdzv-backend", "c10d"]
    script = [str(REPO / "tests/distributed_tests/stuck_run.py"), str(dump_folder)]
    return subprocess.run(
        [*launcher, *shown, "--rdzv-endpoint", "localhost:0", *script, str(bad_rank), misdeed],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    "misdeed, bad_rank, named",
    [
        ("kill", 0, ["rank 0 has been silent", f"last seen at step {BAD_STEP}, phase backward"]),
        ("kill_apart", 1, ["rank 1 has been silent", f"last seen at step {BAD_STEP}, phase backward"]),
        ("freeze", 1, ["rank 1 has been silent", f"last seen at step {BAD_STEP}, phase backward"]),
        (
            "raise",
            2,
            [f"rank 2 failed at step {BAD_STEP}, phase backward: ValueError: a bad batch"],
        ),
        (
            "sleep",
            1,
            [
                f"rank 1 at step {BAD_STEP}, phase backward has not joined collective",
                "in misbehave",
            ],
        ),
        ("skip", 1, ["rank 1 is at", "it has skipped one"]),
    ],
)
def test_the_odd_rank_is_named_and_all_end(tmp_path, misdeed, bad_rank, named):
    run = _launch(tmp_path, bad_rank, misdeed)
    ended = time.time()
    report = tmp_path / "failure.txt"
    assert run.returncode == 1, run.stderr
    for words in named:
        assert words in report.read_text()
        assert words in run.stdout + run.stderr  # whichever rank the user looks at
    misdeed_at = float((tmp_path / "misdeed_at").read_text())
    steps_later = 5 if misdeed == "skip" else 0  # it shows when the others wait for the last one
    assert report.stat().st_mtime - misdeed_at < TIMEOUT_SECONDS + 10 + steps_later
    assert ended - misdeed_at < TIMEOUT_SECONDS + 15 + steps_later
    assert not _processes_of(tmp_path)


def test_a_report_that_cannot_be_written_keeps_nobody_from_ending(tmp_path):
    (tmp_path / "failure.txt").mkdir()
    run = _launch(tmp_path, 1, "freeze")
    ended = time.time()
    said = run.stdout + run.stderr
    assert run.returncode == 1, said
    assert "rank 1 has been silent" in said
    assert "the report of this failure could not be left: [Errno 21] Is a directory" in said
    assert ended - float((tmp_path / "misdeed_at").read_text()) < TIMEOUT_SECONDS + 15
    assert not _processes_of(tmp_path)


def test_told_to_end_is_no_failure(tmp_path):
    run = _launch(tmp_path, 1, "terminate_all")
    assert run.returncode == 128 + 15
    assert "told to end (SIGTERM) at step 3" in run.stdout + run.stderr
    assert not (tmp_path / "failure.txt").exists()
    assert not _processes_of(tmp_path)


def test_a_run_without_trouble_ends_by_itself(tmp_path):
    run = _launch(tmp_path, 1, "none")
    assert (run.returncode, list(tmp_path.glob("failure*"))) == (0, []), run.stderr


def _state(rank: int, **told) -> RankState:
    return RankState(rank, "host", 1, 1, **{"heard_alarm": True, "told_at": 100.0, **told})


@pytest.mark.parametrize(
    "told, odd",
    [
        # Who is silent is the cause, whatever the others have to say.
        ([{"error": "lost peer", "error_from_peer": True}, {"heard_alarm": False}, {}], (1,)),
        ([{}, {"finished": True, "heard_alarm": False}, {"heard_alarm": False}], (2,)),
        # Out of memory on one, and another froze in waiting for it: nobody knows which came first.
        ([{}, {"heard_alarm": False}, {"error": "out of memory"}], (2, 1)),
        # An error of its own before one that a peer caused.
        ([{"error": "x", "error_from_peer": True}, {}, {"error": "y"}], (2,)),
        # Groups are compared among their members only.
        ([{"collectives": {"a": 5}}, {"collectives": {"b": 2}}, {"collectives": {"a": 4}}], (2,)),
        # Ahead with equally many collectives; one of two, the one ahead.
        ([{"num_marks": 9}, {"num_marks": 8}, {"num_marks": 8}], (0,)),
        ([{"num_marks": 9}, {"num_marks": 8}], (0,)),
        ([{"complaint": "no progress"}, {"complaint": "no progress"}], ()),
    ],
)
def test_the_strongest_evidence_decides(told, odd):
    states = [_state(rank, **words) for rank, words in enumerate(told)]
    assert judge(states, now=101.0).odd_ranks == odd


@pytest.mark.parametrize(
    "complaints, number",
    [
        (["interrupted (SIGINT)", ""], signal.SIGINT),
        (["told to end (SIGTERM)", "interrupted (SIGINT)"], signal.SIGINT),
        (["told to end (SIGTERM)", "told to end (SIGTERM)"], signal.SIGTERM),
        (["told to end (SIGTERM)", "no progress for 4 s"], 0),
    ],
)
def test_an_end_that_was_asked_for_is_told_from_a_failure(complaints, number):
    states = [_state(rank, complaint=words) for rank, words in enumerate(complaints)]
    assert judge(states, now=101.0).ended_by == number


@pytest.mark.parametrize("ends_meanwhile", [False, True])
def test_a_frozen_sibling_is_ended_and_nothing_else(tmp_path, monkeypatch, ends_meanwhile):
    """One that ends between the look at it and the signal is no error: that would keep all waiting."""
    sibling = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(os, "getppid", os.getpid)  # both have this launcher
    patrol = _Patrol(Watchdog(World(), 0, tmp_path), World(0, 2), tmp_path)
    state = replace(patrol._state, rank=1, pid=sibling.pid)
    read = Path.read_text

    def read_and_end(path):
        text = read(path)
        if ends_meanwhile:
            sibling.terminate()
            sibling.wait()
        return text

    monkeypatch.setattr(Path, "read_text", read_and_end)
    patrol._kill_sibling(state)
    assert sibling.wait(5) == (-signal.SIGTERM if ends_meanwhile else -signal.SIGKILL)
    patrol._kill_sibling(state)  # it is not there any more


WAITS_FOR_DATA = """
import time
from torch.utils.data import DataLoader
from torchtitan.distributed.comm import World
from torchtitan.observability.watchdog import Watchdog

class Slow(list):
    def __getitem__(self, index):
        time.sleep(0.01)
        return index

with Watchdog(World.from_environment(), 60.0, ".", farewell=lambda: "farewell"):
    for batch in DataLoader(Slow(range(10**6)), num_workers=2):
        print("ready", flush=True)
"""


def test_ctrl_c_while_workers_bring_data_is_an_end_not_a_failure():
    """It goes to the workers, too, and torch raises in the rank of one that ends."""
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", WAITS_FOR_DATA]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=os.environ | one, start_new_session=True, **pipes) as run:
        assert run.stdout.readline() == "ready\n"
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        for process in (*map(int, workers), run.pid):  # a process group's come in any order
            os.kill(process, signal.SIGINT)
            time.sleep(0.2)
        said = run.communicate(timeout=60)[0]
    assert len(workers) == 2 and run.returncode == 130, said
    assert said.replace("ready\n", "") == "interrupted (SIGINT) at step 0, phase start: farewell\n"


def test_ranks_that_say_the_same_are_told_once():
    told = {"error": "no memory", "traceback": "Traceback\n  in step", "step": 3, "phase": "forward"}
    states = [_state(0, **told), _state(1), _state(2, **told), _state(3, **told | {"error": "other"})]
    verdict = judge(states, now=101.0)
    assert verdict.odd_ranks == (0, 2, 3)
    same, other = verdict.headline.split("; ")
    assert same == "ranks 0, 2 failed at step 3, phase forward: no memory"
    assert other == "rank 3 failed at step 3, phase forward: other"
    assert render(states, verdict, now=101.0).endswith("\n\nranks 0, 2, 3 raised\n    Traceback\n      in step")


def _processes_of(dump_folder: Path) -> list[str]:
    """Command lines of processes that still run with this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        if str(dump_folder) in command:
            found.append(command)
    return found
