"""The DeepEP dispatcher over a stand-in of the library: outputs and gradients are those of all-to-all."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed_tests.deep_ep import Buffer
from tests.distributed_tests.dispatchers import (
    EXPERTS,
    RECOMPUTING,
    ROUTINGS,
    differences,
    inputs,
    local_experts,
    results,
)
from torchtitan.distributed.expert_parallel.all_to_all import AllToAllTokenDispatcher
from torchtitan.distributed.expert_parallel.deepep import DeepEPTokenDispatcher
from torchtitan.distributed.launch import run_ranks


def both(score_before=False, split=False):
    """Ours and the all-to-all dispatcher; with `split` the ranks hold the same tokens."""
    world, rank = dist.get_world_size(), dist.get_rank()
    slices = (world, rank) if split else (1, 0)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    buffer = Buffer(mesh.get_group())
    ours = DeepEPTokenDispatcher(buffer, world, EXPERTS, score_before, *slices)
    return ours, AllToAllTokenDispatcher(mesh, EXPERTS, score_before, *slices)


def compare():
    """Each rank has another number of tokens, from none on."""
    torch.use_deterministic_algorithms(True)  # then torch.empty is full of NaN
    world, rank = dist.get_world_size(), dist.get_rank()
    experts = local_experts(EXPERTS // world)
    for score_before in (False, True):
        ours, theirs = both(score_before)
        for step, (routing, mode) in enumerate(itertools.product(ROUTINGS, RECOMPUTING)):
            tensors = inputs((5 * rank + 7 * step) % 13, routing, rank)
            found, expected = (
                results(each, experts, tensors, mode) for each in (ours, theirs)
            )
            assert all(d < 1e-6 for d in differences(found, expected)), (routing, mode, score_before)
        # A recomputation has the layout from the forward before it.
        assert ours.buffer.layouts == len(ROUTINGS) * len(RECOMPUTING)


@pytest.mark.parametrize("world", [2, 4])
def test_results_are_those_of_all_to_all(world):
    run_ranks(compare, world)


def compare_slices():
    """All ranks have the same tokens; ours need no padding to slices of one size."""
    torch.use_deterministic_algorithms(True)
    world = dist.get_world_size()
    ours, theirs = both(split=True)
    experts = local_experts(EXPERTS // world)
    for num_tokens in range(3 * world + 2):
        tensors = inputs(num_tokens, "uniform", 0)
        found, expected = (results(each, experts, tensors) for each in (ours, theirs))
        assert all(d < 1e-6 for d in differences(found, expected)), num_tokens


@pytest.mark.parametrize("world", [2, 4])
def test_slices_of_replicated_tokens(world):
    run_ranks(compare_slices, world)
