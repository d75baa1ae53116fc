"""Does the launcher of local ranks return results by rank, and say what happened when it cannot?"""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from torchtitan.distributed.launch import RankFailure, run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, float, int]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), torch.get_num_threads()


def _environment() -> tuple[str | None, str, str]:
    return os.environ.get("OF_THIS_TEST"), os.environ["RANK"], os.environ["WORLD_SIZE"]


def _misbehave(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("of the test")
        if how == "hang":
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGABRT)
    dist.barrier()


def _exit_badly() -> None:
    # Runs after the result is sent: multiprocessing calls its finalizers on the way out.
    import multiprocessing.util

    multiprocessing.util.Finalize(None, os._exit, args=(3,), exitpriority=100)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(world_size):
    expected = sum(range(world_size)) + 10 * world_size
    assert run_ranks(_sum_of_ranks, world_size, 10) == [(r, expected, 1) for r in range(world_size)]


def test_ranks_see_the_environment_of_the_call(monkeypatch):
    run_ranks(_environment, 1)
    monkeypatch.setenv("OF_THIS_TEST", "yes")
    assert run_ranks(_environment, 2) == [("yes", "0", "2"), ("yes", "1", "2")]


@pytest.mark.parametrize(
    "how, message",
    [
        ("raise", "ValueError: of the test"),
        ("kill", "rank 1 was ended by SIGKILL"),
        ("abort", "rank 1 was ended by SIGABRT"),
    ],
)
def test_a_failing_rank_ends_the_call_at_once(how, message):
    start = time.monotonic()
    with pytest.raises(RankFailure, match="^rank 1 ") as failure:
        run_ranks(_misbehave, 3, how)
    assert time.monotonic() - start < 20
    assert message in str(failure.value)
    assert all(f"rank {rank} " in str(failure.value) for rank in (0, 2))


def test_a_timeout_shows_where_every_rank_hangs():
    with pytest.raises(RankFailure, match="no end after 2 s") as failure:
        run_ranks(_misbehave, 2, "hang", timeout=2)
    assert "rank 1 was still running" in str(failure.value)
    assert str(failure.value).count("in _misbehave") == 2


def test_a_crash_on_the_way_out_is_a_failure():
    with pytest.raises(RankFailure, match="returned, then ended with status 3"):
        run_ranks(_exit_badly, 1)
