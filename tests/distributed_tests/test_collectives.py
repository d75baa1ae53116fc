"""Which collectives a layout makes: those that the design calls for, counted, and no more.

FSDP's are torch's c10d operators and tensor parallelism's the functional ones, so they are told apart.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from tests.distributed_tests.test_data_parallel import EACH, SEQUENCES, build, global_batch, job, tiny
from tests.distributed_tests.test_tensor_parallel import TP2, WHOLE
from torchtitan.distributed.context_parallel import sequence_part
from torchtitan.distributed.fsdp import sync_gradients
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.styles import loss_layout

FSDP = {
    "c10d._allgather_base_": "all-gather",
    "c10d._reduce_scatter_base_": "reduce-scatter",
    "c10d.allreduce_": "all-reduce",
}
TENSOR = {
    "c10d_functional.all_gather_into_tensor": "all-gather",
    "c10d_functional.reduce_scatter_tensor": "reduce-scatter",
    "c10d_functional.all_reduce": "all-reduce",
}
CONTEXT = ("gather_tokens", "sum_tokens", "exchange_tokens")
"""Context parallelism's operators: an all-gather, a reduce-scatter, an all-to-all."""
UNITS = 5
"""What FSDP gathers and reduces at once: the embedding, three blocks, the norm with the head."""
MICROBATCHES = 3


def collectives(config, model_config, microbatches=1, steps=1):
    """For each microbatch on this rank, what its forward and its backward called, by operator."""
    degrees, model = build(model_config, config)
    slots = degrees.slots(dist.get_rank(), SEQUENCES)
    part = sequence_part(config.parallelism, degrees, dist.get_rank())
    tokens, labels = (
        part.cut(x[slots.start : slots.stop]).chunk(microbatches) for x in global_batch()
    )
    each = config.training.sync_gradients_each_microbatch
    calls = []
    with loss_layout(degrees.tp, config.parallelism):
        for number in list(range(microbatches)) * steps:
            sync_gradients(model, number == microbatches - 1, each)
            with counting() as mode:
                loss = model(tokens[number], labels[number])
                forward = _calls(mode)
                loss.backward()
                calls.append((forward, _calls(mode) - forward))
    return calls


def counting():
    """Counts exchanges of sequences' parts too."""
    mode = CommDebugMode()
    mode.comm_registry |= {getattr(torch.ops.torchtitan, name) for name in CONTEXT}
    return mode


def _calls(mode):
    return Counter({str(op): count for op, count in mode.get_comm_counts().items()})


def called(calls, names):
    """Calls by the names given, all others left out."""
    return {name: calls[op] for op, name in names.items() if calls[op]}


GATHERED = {"default": UNITS - 1, "always": UNITS, "never": 0}
"""Units that backward gathers again, by parallelism.fsdp_reshard_after_forward."""


@pytest.mark.parametrize("each", [{}, EACH], ids=["once", "each"])
@pytest.mark.parametrize(
    ("world_size", "replicate", "reshard"),
    [(2, 1, "default"), (2, 1, "always"), (2, 1, "never"), (4, 2, "default"), (2, 2, "default")],
    ids=["fsdp2", "fsdp2, always", "fsdp2, never", "hsdp2x2", "replicate2"],
)
def test_accumulation_reduces_once_and_gathers_as_its_policy_says(
    world_size, replicate, reshard, each
):
    """Gradients of shards are reduced with the last microbatch, or each one; of replicas, the last."""
    config = job(replicate, reshard, training=each)
    calls = run_ranks(collectives, world_size, config, tiny(), MICROBATCHES, 2)[0]
    sharded = world_size > replicate
    for number, (forward, backward) in enumerate(calls):
        last = number % MICROBATCHES == MICROBATCHES - 1
        expected = {}
        if sharded and GATHERED[reshard]:
            expected["all-gather"] = GATHERED[reshard]
        if sharded and (last or each):
            expected["reduce-scatter"] = UNITS
        if replicate > 1 and last:
            expected["all-reduce"] = UNITS
        assert called(forward, FSDP) == ({"all-gather": UNITS} if sharded else {}), number
        assert called(backward, FSDP) == expected, number


SPLIT_BLOCK = {"all-gather": 2, "reduce-scatter": 2}
NORMS = {"all-reduce": 2}
"""With sequence parallelism a norm sees parts of the sequence: its weight's gradient is summed."""
LOSS = {"all-reduce": 3}
"""Of logits split over the vocabulary: the maximum, the sum of exponentials, the label's logit."""


@pytest.mark.parametrize("recomputed", [False, True], ids=["no ac", "full ac"])
@pytest.mark.parametrize("world_size", [2, 4], ids=["tp2", "fsdp2 x tp2"])
def test_sequence_parallel_blocks_gather_twice_and_scatter_twice_each_way(world_size, recomputed):
    block, ends, sharding = tensor_parallel_calls(world_size, TP2, recomputed)
    assert block[0] == SPLIT_BLOCK
    assert block[1] == {kind: count * (1 + recomputed) for kind, count in SPLIT_BLOCK.items()} | NORMS
    # The embedding scatters its sums, the head gathers what it projects; and back.
    around = {"all-gather": 1, "reduce-scatter": 1}
    assert ends == (around | LOSS, around | {"all-reduce": 1})
    blockwise = {"all-gather": 1} if world_size == 4 else {}
    assert sharding == (blockwise, blockwise | ({"reduce-scatter": 1} if blockwise else {}))


@pytest.mark.parametrize("recomputed", [False, True], ids=["no ac", "full ac"])
def test_blocks_without_sequence_parallelism_reduce_twice_each_way(recomputed):
    block, ends, _ = tensor_parallel_calls(2, WHOLE, recomputed)
    assert block == ({"all-reduce": 2}, {"all-reduce": 2 * (1 + recomputed)})
    assert ends == ({"all-reduce": 1 + LOSS["all-reduce"]}, {"all-reduce": 1})


def tensor_parallel_calls(world_size, tp, recomputed):
    """(Of one block, of what is around the blocks, of one block's FSDP), each (forward, backward)."""
    config = job(tp=tp, ac="full" if recomputed else "none")
    two, three = run_ranks(collectives_of_depths, world_size, config, (2, 3))[0]
    block = [more - less for more, less in zip(three, two, strict=True)]
    ends = [less - one - one for less, one in zip(two, block, strict=True)]
    return (
        tuple(called(calls, TENSOR) for calls in block),
        tuple(called(calls, TENSOR) for calls in ends),
        tuple(called(calls, FSDP) for calls in block),
    )


def collectives_of_depths(config, depths):
    shape = tiny(n_heads=4, n_kv_heads=4, dim=40)
    return [collectives(config, replace(shape, n_layers=depth))[0] for depth in depths]
