"""A rank that is killed in a save costs no more than that save."""

import pytest

from tests.distributed_tests.kill_saves import kill_saves, losses, uninterrupted


@pytest.mark.parametrize(("mode", "seed"), [("disabled", 1), ("async", 2)])
def test_a_killed_rank_costs_at_most_one_interval(tmp_path, mode, seed):
    fallen = kill_saves(tmp_path / "killed", points=3, ranks=2, seed=seed, mode=mode)
    assert fallen.total() == 3
    ours = losses(tmp_path / "killed")
    assert ours == uninterrupted(tmp_path / "whole", 2, max(ours))
