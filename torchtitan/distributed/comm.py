"""Where this process stands among the others: its rank, its device, its process group and timeouts."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor  # no public name in 2.11 and 2.13
from torch.distributed import distributed_c10d as c10d

from torchtitan.config.schema import Comm

BACKEND_GRACE_SECONDS = 8
"""How much longer than asked a collective may hang before the backend ends the process: the
watchdog, which names the odd rank, must be first to speak."""

_BACKGROUND = "background"
_NAMED: dict[str, dist.ProcessGroup] = {}


@dataclass(frozen=True)
class World:
    """What the launcher said; one process that no launcher started is a world of its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "World":
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )


def pick_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run on units made for them; else they are 20 to 40 times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def init_process_group(comm: Comm, dump_folder: str | Path, device: torch.device) -> None:
    """Join the launcher's process group: gloo between CPUs, and NCCL between GPUs where there are any."""
    _set_flight_recorder(comm, Path(dump_folder))
    world = World.from_environment()
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=_backend_timeout(comm.init_timeout_seconds),
        device_id=device if on_gpu else None,
        # A process that no launcher started has no address to meet at, and needs none.
        **({} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore()}),
        rank=world.rank,
        world_size=world.size,
    )


def set_timeout(seconds: float) -> None:
    """Set the timeout of all groups there are; those made later begin with torch's 10 to 30 minutes.

    A collective of all ranks: one that still has slow work to do under the old timeout must not meet
    peers who wait for it under the new one.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    for group, _ in _groups():
        c10d._set_pg_timeout(_backend_timeout(seconds), group)  # no public way in 2.11 and 2.13


def register_group(group: dist.ProcessGroup) -> str:
    """A name for `group_named`: operators take no process group as an argument."""
    _NAMED[group.group_name] = group
    return group.group_name


def group_named(name: str) -> dist.ProcessGroup:
    """The group that was registered under this name."""
    return _NAMED[name]


def new_background_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for a thread beside training, at its own pace and without timeout.

    Two threads must not share one: their collectives would mix. A rank that dies is noticed by the
    others' main threads.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=1), group_desc=_BACKGROUND)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether nobody knows what is in it, as in a dry run."""
    return isinstance(tensor, FakeTensor)


def destroy_process_group() -> None:
    """Leave together: a rank that leaves early breaks the last collective of a slower one."""
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads let go of what they carried, for which they need Python. If it ends first they abort.
    time.sleep(0.1)


def collectives_started() -> dict[str, int]:
    """How many collectives this rank has entered, by group; may be called from any thread."""
    return {
        f"{group.group_desc} of ranks {','.join(map(str, ranks))}": (
            group._get_sequence_number_for_group()  # no public way in 2.11 and 2.13
        )
        for group, ranks in _groups()
    }


def _groups() -> list[tuple[dist.ProcessGroup, dict[int, int]]]:
    """Every process group of this rank's main thread, with its global ranks."""
    world = c10d._world  # no public list in 2.11 and 2.13
    return [
        (group, world.pg_group_ranks.get(group, {}))
        for group in list(world.pg_map)
        if group.group_desc != _BACKGROUND
    ]


def _backend_timeout(seconds: float) -> timedelta:
    return timedelta(seconds=seconds + BACKEND_GRACE_SECONDS)


def _set_flight_recorder(comm: Comm, dump_folder: Path) -> None:
    """Tell torch how many collectives to remember, and where NCCL's watchdog writes them on a timeout.

    Read once, by the first process group. What the user has set in the environment stays.
    """
    folder = dump_folder / comm.save_traces_folder
    settings = {"TORCH_FR_BUFFER_SIZE": str(comm.trace_buf_size)}
    if comm.trace_buf_size > 0:
        folder.mkdir(parents=True, exist_ok=True)
        settings["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
        settings["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / comm.save_traces_file_prefix)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
