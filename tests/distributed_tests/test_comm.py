"""Do process groups start without a launcher, end late collectives in time and count them?"""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from torchtitan.config.schema import Comm
from torchtitan.distributed import comm
from torchtitan.distributed.launch import run_ranks

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _start_without_launcher(dump_folder: str) -> tuple[comm.World, float, str]:
    dist.destroy_process_group()
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    world = comm.World.from_environment()
    comm.init_process_group(Comm(trace_buf_size=7), dump_folder, comm.pick_device(world))
    total = torch.ones(1)
    dist.all_reduce(total)
    return world, total.item(), os.environ["TORCH_FR_BUFFER_SIZE"]


def _late_for_a_mesh_axis() -> str:
    mesh = init_device_mesh("cpu", (2,))  # a group made after the default one
    comm.set_timeout(1 - comm.BACKEND_GRACE_SECONDS)
    if dist.get_rank() == 1:
        time.sleep(3)
        return "late"
    with pytest.raises(RuntimeError, match="Timed out"):
        dist.all_reduce(torch.ones(1), group=mesh.get_group())
    os._exit(0)  # the group is broken, and so would be the launcher's last barrier


def _count_collectives() -> dict[str, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    before = comm.collectives_started()
    dist.all_reduce(torch.ones(1), group=mesh["tp"].get_group())
    return {name: n - before[name] for name, n in comm.collectives_started().items()}


def test_one_process_needs_no_launcher(tmp_path):
    [(world, total, recorded)] = run_ranks(_start_without_launcher, 1, str(tmp_path))
    assert (world, total, recorded) == (comm.World(rank=0, size=1, local_rank=0), 1.0, "7")
    assert (tmp_path / "comm_traces").is_dir()


def test_the_timeout_holds_for_every_group():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 0 exited with 0"):
        run_ranks(_late_for_a_mesh_axis, 2, timeout=30)
    assert time.monotonic() - start < 10


def test_collectives_are_counted_by_group():
    first, *_ = run_ranks(_count_collectives, 4)
    assert first == {
        "default_pg of ranks 0,1,2,3": 0,
        "mesh_dp of ranks 0,2": 0,
        "mesh_tp of ranks 0,1": 1,
    }
