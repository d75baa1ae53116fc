"""Sequences split between ranks have the weights and gradients of one process."""

from dataclasses import replace

import pytest

from tests.distributed_tests.test_collectives import (
    CONTEXT,
    FSDP,
    TENSOR,
    called,
    collectives_of_depths,
)
from tests.distributed_tests.test_data_parallel import (
    assert_equals_one_process,
    gradients,
    job,
    tiny,
)
from torchtitan.distributed.launch import run_ranks

PLAIN = {"context_parallel_load_balancer": None}
EXCHANGED = {"context_parallel_rotate_method": "alltoall"}
HEADS = {"context_parallel_method": "heads"}


def split(cp, *options, tp=1, **more):
    degrees = {"context_parallel_degree": cp, "tensor_parallel_degree": tp}
    for option in options:
        degrees |= option
    return job(tp=degrees, **more)


NO_SP = {"enable_sequence_parallel": False}
FULL = {"ac": "full"}
BY_OP = {"ac": "selective", "selective_ac_option": "op"}
LAYOUTS = {
    "cp2": (2, split(2), 1),
    "cp2, plain": (2, split(2, PLAIN), 1),
    "cp2, alltoall": (2, split(2, EXCHANGED), 1),
    "cp2, alltoall, plain": (2, split(2, EXCHANGED, PLAIN), 1),
    "cp2, heads": (2, split(2, HEADS), 1),
    "cp4": (4, split(4), 1),
    "cp4, alltoall": (4, split(4, EXCHANGED), 1),
    "cp4, alltoall, plain": (4, split(4, EXCHANGED, PLAIN), 1),
    "cp4, heads": (4, split(4, HEADS), 1),
    "fsdp2 x cp2, accumulate": (4, split(2), 3),
    "replicate2 x cp2": (4, split(2, replicate=2), 1),
    "cp2 x tp2": (4, split(2, tp=2), 1),
    "cp2 x tp2, heads": (4, split(2, HEADS, tp=2), 1),
    "cp2 x tp2, no sp": (4, split(2, NO_SP, tp=2), 1),
    "hsdp2x1 x cp2 x tp2": (8, split(2, EXCHANGED, tp=2, replicate=2), 2),
    "cp2, full ac": (2, split(2, **FULL), 1),
    "cp2, heads, by-op ac": (2, split(2, HEADS, **BY_OP), 1),
    "cp2, by-op ac": (2, split(2, **BY_OP), 1),
    "cp2, compile": (2, split(2, compiled=True), 1),
    "cp2, alltoall, compile, full ac": (2, split(2, EXCHANGED, compiled=True, **FULL), 1),
    "cp2 x tp2, heads, compile, by-op ac": (4, split(2, HEADS, tp=2, compiled=True, **BY_OP), 1),
}


WITHOUT_DOCUMENTS = ("cp2", "cp2, alltoall, plain", "cp4, heads", "cp2 x tp2", "cp2, compile")
"""Layouts that are tried with attention to the whole sequence too."""
CASES = [("block_causal", name) for name in LAYOUTS]
CASES += [("causal", name) for name in WITHOUT_DOCUMENTS]


@pytest.fixture(scope="module")
def references():
    shape = tiny(n_heads=8, n_kv_heads=4, dim=48)
    configs = [replace(shape, attn_mask_type=kind) for kind in ("causal", "block_causal")]
    return {c.attn_mask_type: (c, run_ranks(gradients, 1, c, job())[0]) for c in configs}


@pytest.mark.parametrize(("mask_type", "name"), CASES)
def test_gradients_equal_one_process(references, mask_type, name):
    assert_equals_one_process(references[mask_type], LAYOUTS[name])


EXCHANGES = {
    "kv, allgather": (split(2), {"gather_tokens": 1}, {"sum_tokens": 1}),
    "kv, alltoall": (split(2, EXCHANGED), {"exchange_tokens": 1}, {"exchange_tokens": 1}),
    "heads": (split(2, HEADS), {"exchange_tokens": 2}, {"exchange_tokens": 2}),
    "heads, full ac": (split(2, HEADS, **FULL), {"exchange_tokens": 2}, {"exchange_tokens": 4}),
}
"""Of one block: config, forward, backward (docs/parallelism.md)."""


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_attention_exchanges_as_often_as_the_docs_say_and_a_block_nothing_else(name):
    config, forward, backward = EXCHANGES[name]
    two, three = run_ranks(collectives_of_depths, 2, config, (2, 3))[0]
    block = [more - less for more, less in zip(three, two, strict=True)]
    names = {f"torchtitan.{name}": name for name in CONTEXT}
    assert [called(calls, names) for calls in block] == [forward, backward]
    assert [called(calls, TENSOR) for calls in block] == [{}, {}]
    # Parameters are sharded over the same ranks.
    assert called(block[0], FSDP) == {"all-gather": 1}
    assert called(block[1], FSDP) == {"all-gather": 1, "reduce-scatter": 1}
