"""A dispatcher that cannot work here is refused before the start, with what stands against it."""

import sys

import pytest
import torch

from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.distributed.expert_parallel.dispatchers import check_comm_backend

GPU, CPU = torch.device("cuda"), torch.device("cpu")
EP2, EP4 = (f"--parallelism.expert_parallel_degree={ep}" for ep in (2, 4))
DEEPEP, SHARED = (
    f"--parallelism.expert_parallel_comm_backend={backend}" for backend in ("deepep", "symmetric_memory")
)
FP32 = "--training.mixed_precision_param=float32"
REFUSED = {
    "no experts elsewhere": ([SHARED], GPU, "expert_parallel_degree is 1"),
    "quantized experts": (
        [EP2, SHARED, "--model.converters=quantize.grouped_mm.float8"],
        GPU,
        "does not align rows",
    ),
    "no GPU": ([EP2, SHARED], CPU, "trains on its CPU"),
    "no library": ([EP2, DEEPEP], GPU, "the library deep_ep, which cannot be imported here"),
    "not bfloat16": ([EP2, DEEPEP, FP32], GPU, "mixed_precision_param is float32"),
    "more than a host": ([EP4, SHARED], GPU, "experts are on 4 ranks, and a host has 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    argv, device, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=reason):
        check_comm_backend(load_config(argv), device, world_size=8)


@pytest.mark.parametrize("argv", [[], [EP2], [EP2, SHARED]], ids=str)
def test_what_can_work_is_not(argv, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_comm_backend(load_config(argv), GPU, world_size=8)


def test_the_library_is_asked_for_only_where_it_is_used():
    check_comm_backend(load_config([EP2]), GPU, world_size=2)
    assert "deep_ep" not in sys.modules
