"""What each GPU of tests/gpu_tests/test_symmetric_memory.py does; started by torch.distributed.run."""

import itertools
import os
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed_tests.dispatchers import (
    RECOMPUTING,
    ROUTINGS,
    differences,
    inputs,
    local_experts,
    results,
)
from torchtitan.distributed.expert_parallel.all_to_all import AllToAllTokenDispatcher
from torchtitan.distributed.expert_parallel.peer_exchange import PeerExchange, Sizes
from torchtitan.distributed.expert_parallel.peer_memory import SymmetricMemory
from torchtitan.distributed.expert_parallel.symmetric_memory import SymmetricMemoryTokenDispatcher

EXPERTS, TOP_K, DIM, HIDDEN, MOST_TOKENS = 16, 4, 1024, 512, 2048
SIZES = (EXPERTS, TOP_K, DIM)


def both(mesh, score_before=False, factor=9.0):
    sizes = Sizes(mesh.size(), MOST_TOKENS, TOP_K, DIM, EXPERTS, factor)
    open_memory = partial(SymmetricMemory, mesh.get_group())
    exchange = PeerExchange(sizes, torch.bfloat16, open_memory)
    ours = SymmetricMemoryTokenDispatcher(exchange, EXPERTS, score_before)
    return ours, AllToAllTokenDispatcher(mesh, EXPERTS, score_before)


def assert_equal(ours, theirs, what):
    """In every bit."""
    found = [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert all(found), (what, found, differences(ours, theirs))


def poison():
    """Let what is not yet written be NaN: the allocator hands the same memory out again."""
    torch.full((2**28,), float("nan"), device="cuda")


def compare(mesh, device):
    """Some layers in a row; other numbers of tokens on each rank, from none on."""
    rank = dist.get_rank()
    experts = local_experts(EXPERTS // mesh.size(), device, torch.bfloat16, DIM, HIDDEN)
    for score_before in (False, True):
        ours, theirs = both(mesh, score_before)
        for step, case in enumerate(itertools.product(ROUTINGS, RECOMPUTING)):
            num_tokens = (0, 1, 700, MOST_TOKENS, 77)[(step + 2 * rank) % 5]
            tensors = inputs(num_tokens, case[0], rank, device, torch.bfloat16, SIZES)
            poison()
            found = results(ours, experts, tensors, case[1], layers=3)
            expected = results(theirs, experts, tensors, case[1], layers=3)
            assert_equal(found, expected, (case, score_before))
            again = results(ours, experts, tensors, case[1], layers=3)
            assert_equal(again, found, (case, score_before, "again"))
    print(f"rank {rank}: all cases equal all-to-all in every bit", flush=True)


def without_waiting(mesh, device):
    """Forward, backward and recomputation, and the host waits for nothing."""
    ours, _ = both(mesh)
    experts = local_experts(EXPERTS // mesh.size(), device, torch.bfloat16, DIM, HIDDEN)
    tensors = inputs(MOST_TOKENS, "uniform", dist.get_rank(), device, torch.bfloat16, SIZES)
    for mode in RECOMPUTING:
        results(ours, experts, tensors, mode, layers=2)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        results(ours, experts, tensors, mode, layers=2)
        torch.cuda.set_sync_debug_mode("default")
    print(f"rank {dist.get_rank()}: no host syncs", flush=True)


def overflow(mesh, device):
    """More rows than there is room for, all to one rank: NaN on every rank, and the next step is right."""
    ours, theirs = both(mesh, factor=1.0)
    rank = dist.get_rank()
    experts = local_experts(EXPERTS // mesh.size(), device, torch.bfloat16, DIM, HIDDEN)
    tensors = inputs(MOST_TOKENS, "one rank", rank, device, torch.bfloat16, SIZES)
    out = results(ours, experts, tensors)[0]
    assert out.isnan().all()
    assert ours.peak_received_bytes > ours.exchange.sizes.num_rows * DIM * 2
    tensors = inputs(MOST_TOKENS // 2, "uniform", rank, device, torch.bfloat16, SIZES)
    assert_equal(results(ours, experts, tensors), results(theirs, experts, tensors), "after")
    print(f"rank {rank}: too many rows make NaN", flush=True)


def main():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("ep",))
    compare(mesh, device)
    without_waiting(mesh, device)
    overflow(mesh, device)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
