"""Ranks that are not there: process groups without peers, and a count of what would be sent to them.

FakeTensorMode, the fake backend and functorch's config have no public names; checked on torch 2.13.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d as c10d
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

_KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::send": "send",
    "c10d::recv_": "receive",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "torchtitan::exchange_tokens": "all_to_all",
    "torchtitan::gather_tokens": "all_gather",
    "torchtitan::sum_tokens": "reduce_scatter",
}
"""What operators that talk to other ranks do."""
_OUTPUT_FIRST = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::alltoall_base_")


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[FakeTensorMode]:
    """Be one of `world_size` ranks, alone: collectives return at once, with nothing.

    Meshes and models are made outside of the mode that this yields, and computed with inside of it.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        # Backward is compiled with forward: what torch puts off it copies, and fails at fake constants.
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        dist.destroy_process_group()


def skip_vote(schedule: Any) -> None:
    """Let a pipeline's schedule not ask the other stages whether shapes are known: they are."""
    try:
        from torch.distributed.pipelining._utils import InferenceMode
    except ImportError:  # torch 2.11 asks nobody
        return

    def agree(stages, *_) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    schedule._warmup_p2p = agree


Ranks = tuple[int, ...]


class CollectiveCounter(TorchDispatchMode):
    """Counts calls and bytes of collectives by their kind and ranks: what this rank puts in."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.calls: dict[tuple[str, Ranks], int] = defaultdict(int)
        self.bytes: dict[tuple[str, Ranks], int] = defaultdict(int)

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled code may run inside of it."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does by itself comes here
        name = func.name()
        if kind := _KINDS.get(name):
            key = kind, _ranks((*args, *(kwargs or {}).values()))
            self.calls[key] += 1
            given = args[name in _OUTPUT_FIRST]
            self.bytes[key] += (given[0] if isinstance(given, list | tuple) else given).nbytes
        return func(*args, **(kwargs or {}))


def _ranks(arguments: tuple[Any, ...]) -> Ranks:
    """Of the group that an operator was given, as an object or by name."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            try:
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(argument)))
            except (RuntimeError, ValueError):  # another kind of object, such as the reduction
                continue
    name = next(argument for argument in reversed(arguments) if isinstance(argument, str))
    return tuple(dist.get_process_group_ranks(c10d._resolve_process_group(name)))
