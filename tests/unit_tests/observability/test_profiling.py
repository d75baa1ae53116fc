"""Profiler traces: where they go, what is in them; snapshots are for GPUs."""

import gzip
import json

import pytest
import torch

from torchtitan.config.faults import ConfigError
from torchtitan.config.schema import Profiling
from torchtitan.logging import logger
from torchtitan.observability.profiling import StepRecorders

CPU = torch.device("cpu")
CONFIG = Profiling(enable_profiling=True, profile_freq=3, profiler_warmup=1, profiler_active=1)


def run_steps(recorders: StepRecorders, first: int, last: int) -> None:
    """Step n works on a vector of n elements, by which it is found in a trace."""
    with recorders:
        for step in range(first, last + 1):
            torch.ones(step).relu()
            recorders.step()


def traced_steps(path) -> list[int]:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [e["args"]["Input Dims"][0][0] for e in events if e.get("name") == "aten::relu"]


@pytest.mark.parametrize("resumed", [0, 2])
def test_one_trace_a_cycle_and_rank_of_its_last_step_also_after_a_resume(tmp_path, resumed):
    for rank in (0, 1):
        recorders = StepRecorders(CONFIG, str(tmp_path), rank=rank, device=CPU, step=resumed)
        run_steps(recorders, resumed + 1, 7)
    for rank in (0, 1):
        paths = sorted(tmp_path.glob(f"profile_traces/*/rank_{rank}.json.gz"))
        assert [(path.parent.name, traced_steps(path)) for path in paths] == [
            ("step_3", [3]),
            ("step_6", [6]),
        ]


def test_a_run_too_short_for_a_trace_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    run_steps(StepRecorders(CONFIG, str(tmp_path), rank=0, device=CPU, step=0), 1, 1)
    assert not list(tmp_path.iterdir())
    assert "profiling.profile_freq = 3: the run ended before its first trace" in caplog.text


def test_nothing_is_recorded_by_default(tmp_path):
    run_steps(StepRecorders(Profiling(), str(tmp_path), rank=0, device=CPU, step=0), 1, 10)
    assert not list(tmp_path.iterdir())


def test_memory_snapshots_are_refused_on_a_cpu(tmp_path):
    config = Profiling(enable_memory_snapshot=True)
    with pytest.raises(ConfigError, match="profiling.enable_memory_snapshot.*on cpu"):
        StepRecorders(config, str(tmp_path), rank=0, device=CPU, step=0)
