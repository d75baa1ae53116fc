"""The symmetric-memory dispatcher over memory that processes share: equal to all-to-all in every bit."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed_tests.dispatchers import (
    DIM,
    EXPERTS,
    RECOMPUTING,
    ROUTINGS,
    TOP_K,
    inputs,
    local_experts,
    results,
)
from torchtitan.distributed.expert_parallel.all_to_all import AllToAllTokenDispatcher
from torchtitan.distributed.expert_parallel.peer_exchange import PeerExchange, Sizes
from torchtitan.distributed.expert_parallel.symmetric_memory import SymmetricMemoryTokenDispatcher
from torchtitan.distributed.launch import run_ranks

MOST_TOKENS = 12


class FileMemory:
    """A file of each rank, mapped by all of them: what one writes the others read."""

    opened = itertools.count()

    def __init__(self, folder, group, num_bytes):
        self.group, self.rank = group, group.rank()
        number = next(self.opened)
        ranks = dist.get_process_group_ranks(group)
        names = [str(folder / f"{number}_{rank}.bin") for rank in ranks]
        torch.UntypedStorage.from_file(names[self.rank], shared=True, nbytes=num_bytes).fill_(255)
        self.barrier()
        storages = [torch.UntypedStorage.from_file(n, shared=True, nbytes=num_bytes) for n in names]
        self.buffers = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages]

    def barrier(self):
        dist.barrier(self.group)


def both(folder, score_before=False, split=False, factor=9.0):
    """Ours and the all-to-all dispatcher; with `split` the ranks hold the same tokens."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = Sizes(world, MOST_TOKENS, TOP_K, DIM, EXPERTS, factor)
    slices = (world, rank) if split else (1, 0)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    exchange = PeerExchange(sizes, torch.float32, partial(FileMemory, folder, mesh.get_group()))
    ours = SymmetricMemoryTokenDispatcher(exchange, EXPERTS, score_before, *slices)
    return ours, AllToAllTokenDispatcher(mesh, EXPERTS, score_before, *slices)


def compare(folder):
    """Each rank has another number of tokens, from none to as many as there is room for."""
    torch.use_deterministic_algorithms(True)  # then torch.empty is full of NaN
    world, rank = dist.get_world_size(), dist.get_rank()
    experts = local_experts(EXPERTS // world)
    for score_before in (False, True):
        ours, theirs = both(folder, score_before)
        for step, (routing, mode) in enumerate(itertools.product(ROUTINGS, RECOMPUTING)):
            num_tokens = (5 * rank + 7 * step) % (MOST_TOKENS + 1)
            tensors = inputs(num_tokens, routing, rank)
            found, expected = (
                results(each, experts, tensors, mode, layers=3) for each in (ours, theirs)
            )
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), (routing, mode, score_before)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_bit_is_that_of_all_to_all(tmp_path, world):
    run_ranks(compare, world, tmp_path)


def compare_slices(folder):
    """All ranks have the same tokens; ours need no padding to slices of one size."""
    torch.use_deterministic_algorithms(True)
    world = dist.get_world_size()
    ours, theirs = both(folder, split=True)
    experts = local_experts(EXPERTS // world)
    for num_tokens in range(3 * world + 2):
        tensors = inputs(num_tokens, "uniform", 0)
        found, expected = (results(each, experts, tensors) for each in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b), num_tokens


@pytest.mark.parametrize("world", [2, 4])
def test_slices_of_replicated_tokens(tmp_path, world):
    run_ranks(compare_slices, world, tmp_path)


def overflow(folder):
    """Between steps that fit one that does not: its outputs are NaN on every rank, the next are right."""
    world, rank = dist.get_world_size(), dist.get_rank()
    ours, theirs = both(folder, factor=1.0)
    experts = local_experts(EXPERTS // world)
    for num_tokens, routing in ((4, "uniform"), (MOST_TOKENS, "one rank"), (5, "uniform")):
        tensors = inputs(num_tokens, routing, rank)
        found, expected = (results(each, experts, tensors) for each in (ours, theirs))
        share = float(ours.peak_received_bytes / ours.received_bytes_limit)
        ours.peak_received_bytes = 0
        if routing == "one rank":
            sizes = ours.exchange.sizes
            assert share == pytest.approx(sizes.worst_case / sizes.num_rows)
            assert found[0].isnan().all()
        else:
            assert share < 1
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_too_many_rows_spoil_everything_and_what_comes_after_is_right(tmp_path, world):
    run_ranks(overflow, world, tmp_path)
