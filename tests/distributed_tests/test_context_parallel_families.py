"""Sequences split between ranks, for experts and attention of every kind, equal one process."""

from dataclasses import replace

import pytest

from tests.distributed_tests.test_context_parallel import BY_OP, EXCHANGED, FULL, HEADS, NO_SP, PLAIN
from tests.distributed_tests.test_data_parallel import SEQUENCES, assert_equal_on_all_ranks, job
from tests.distributed_tests.test_moe_layouts import gradients_of_all
from torchtitan.distributed.launch import run_ranks
from torchtitan.models import deepseek_v3, gpt_oss, llama4, qwen3


def packed(config, **moe):
    small = config.shrunk(4)  # heads for cp 2 x tp 2, or cp 4
    changes = {"n_layers": 2, "seq_len": 8, "attn_mask_type": "block_causal"}
    return replace(small, moe=replace(small.moe, **moe), **changes)


MODELS = [
    packed(qwen3.FLAVORS["30B-A3B"], global_balance_coeff=0.1, router_z_coeff=0.01),
    packed(deepseek_v3.FLAVORS["671B"], sequence_balance_coeff=0.1),
]


def split(cp, *options, tp=1, ep=1, etp=1, replicate=1, **more):
    degrees = {
        "context_parallel_degree": cp,
        "tensor_parallel_degree": tp,
        "expert_parallel_degree": ep,
        "expert_tensor_parallel_degree": etp,
    }
    for option in options:
        degrees |= option
    batch = {"global_batch_size": SEQUENCES, "local_batch_size": 1}  # balance losses are means over it
    return job(replicate, tp=degrees, training=batch, **more)


LAYOUTS = {
    "cp2": (2, split(2), 1),
    "cp2, heads": (2, split(2, HEADS), 3),
    "cp2 ep2": (2, split(2, EXCHANGED, ep=2), 1),
    "cp4 ep4, plain": (4, split(4, PLAIN, ep=4), 1),
    "cp4, alltoall, full ac": (4, split(4, EXCHANGED, **FULL), 1),
    "cp4 ep2, heads, by-op ac": (4, split(4, HEADS, ep=2, **BY_OP), 1),
    "fsdp2 x cp2 ep2": (4, split(2, ep=2), 1),
    "cp2 x tp2 ep2": (4, split(2, tp=2, ep=2), 1),
    "cp2 x tp2 ep2, heads, plain": (4, split(2, HEADS, PLAIN, tp=2, ep=2), 1),
    "cp2 x tp2 ep4, alltoall": (4, split(2, EXCHANGED, tp=2, ep=4), 1),
    "cp2 x tp2 ep2 etp2": (4, split(2, tp=2, ep=2, etp=2), 1),
    "cp2 x tp2, no sp": (4, split(2, NO_SP, tp=2), 1),
    "cp2 x tp2 ep2, no sp, full ac": (4, split(2, NO_SP, tp=2, ep=2, **FULL), 1),
    "cp4 x tp2 ep2, alltoall": (8, split(4, EXCHANGED, tp=2, ep=2), 1),
    "cp2 ep2, compile, by-op ac": (2, split(2, ep=2, compiled=True, **BY_OP), 1),
}


@pytest.fixture(scope="module")
def references():
    return run_ranks(gradients_of_all, 1, MODELS, split(1))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_process(references, name):
    world_size, config, microbatches = LAYOUTS[name]
    ranks = run_ranks(gradients_of_all, world_size, MODELS, config, microbatches, timeout=180)
    for i, reference in enumerate(references):
        assert_equal_on_all_ranks(reference, [rank[i] for rank in ranks])


PATTERNED = [
    replace(packed(gpt_oss.FLAVORS["20b"]), sliding_window=3),
    replace(
        packed(llama4.FLAVORS["17bx16e_irope"]), attention_chunk=3, nope_interval=2, floor_scale=2
    ),
]


@pytest.mark.parametrize("name", ["cp4, alltoall, full ac", "cp2 x tp2 ep2, heads, plain"])
def test_sinks_windows_chunks_and_layers_without_positions(name):
    references = run_ranks(gradients_of_all, 1, PATTERNED, split(1))[0]
    world_size, config, _ = LAYOUTS[name]
    ranks = run_ranks(gradients_of_all, world_size, PATTERNED, config, timeout=180)
    for i, reference in enumerate(references):
        assert_equal_on_all_ranks(reference, [rank[i] for rank in ranks])
