"""Which collectives an MoE layer makes, for each row of the table "where tokens live" (docs/moe.md)."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.distributed_tests.test_collectives import FSDP, TENSOR, called, collectives
from tests.distributed_tests.test_moe_layouts import BY_OP, FULL, moe, parallel
from torchtitan.distributed.launch import run_ranks

EXCHANGE = {"c10d_functional.all_to_all_single": "all-to-all"}
MADE = TENSOR | EXCHANGE
THERE = Counter({"all-to-all": 1 + 2})
"""Of row counts, and of rows to experts and back."""
BACK = Counter({"all-to-all": 2})
SPLIT = Counter({"all-gather": 1, "reduce-scatter": 1})
SUMMED = Counter({"all-reduce": 1})
GATE = Counter({"all-reduce": 1})
"""The gradient of a weight that tensor-parallel ranks use for different tokens or rows is summed."""
SHARED = Counter({"all-reduce": 3})
"""So are those of the shared expert, where each rank takes its own part of the sequence."""

TABLE = {
    "sp, etp 1, ep 2": (parallel(2, 2, 1), THERE, BACK + GATE + SHARED),
    "sp, etp 2, ep 2": (parallel(2, 2, 2), THERE + SPLIT, BACK + SPLIT + GATE),
    "sp, ep 1": (parallel(2), SPLIT, SPLIT + GATE),
    "no sp, etp 1, ep 2": (parallel(2, 2, 1, False), THERE + SUMMED, BACK + SUMMED + GATE),
    "no sp, etp 2, ep 2": (parallel(2, 2, 2, False), THERE + SUMMED, BACK + SUMMED + GATE),
    "no sp, ep 1": (parallel(2, sp=False), SUMMED, SUMMED + GATE),
}
"""Of one MoE layer: config, forward, backward."""


def calls_of_a_block(configs):
    """What one block more calls, for each config as (forward, backward)."""
    shapes = [replace(moe(), n_layers=depth) for depth in (2, 3)]
    pairs = [[collectives(config, shape)[0] for shape in shapes] for config in configs]
    return [[more - less for less, more in zip(*pair, strict=True)] for pair in pairs]


@pytest.fixture(scope="module")
def blocks():
    """By row of the table, on two data-parallel times two tensor-parallel ranks."""
    ranks = run_ranks(calls_of_a_block, 4, [config for config, *_ in TABLE.values()], timeout=120)
    assert all(rank == ranks[0] for rank in ranks)
    return dict(zip(TABLE, ranks[0], strict=True))


@pytest.mark.parametrize("row", TABLE)
def test_a_layer_calls_what_the_table_says_and_nothing_more(blocks, row):
    config, forward, backward = TABLE[row]
    if config.parallelism.enable_sequence_parallel:
        norms = Counter({"all-reduce": 2})
        forward, backward = forward + SPLIT, backward + SPLIT + norms  # attention's and norms'
    else:
        forward, backward = forward + SUMMED, backward + SUMMED
    assert [called(calls, MADE) for calls in blocks[row]] == [forward, backward]


@pytest.mark.parametrize("row", TABLE)
def test_experts_that_fsdp_shards_over_other_ranks_are_gathered_by_themselves(blocks, row):
    apart = row.endswith("etp 1, ep 2")  # with etp 2, ep 2 no rank has another's experts
    units = 1 + apart
    forward, backward = (called(calls, FSDP) for calls in blocks[row])
    assert forward == {"all-gather": units}
    assert backward == {"all-gather": units, "reduce-scatter": units}


def exchanges(configs):
    """For each config, how often forward and backward of two MoE layers send something."""
    calls = [collectives(config, moe())[0] for config in configs]
    return [[called(part, EXCHANGE)["all-to-all"] for part in both] for both in calls]


def test_a_recomputation_does_not_exchange_counts_again():
    """Nor rows, where checkpointing is by operation: it keeps those received."""
    modes = [parallel(ep=2), parallel(ep=2, **FULL), parallel(ep=2, **BY_OP)]
    layers, there, back, recomputed = 2, 3, 2, 2
    kept = [layers * there, layers * back]
    expected = [kept, [layers * there, layers * (back + recomputed)], kept]
    assert run_ranks(exchanges, 2, modes) == [expected] * 2
