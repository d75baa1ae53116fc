"""Attention of every kind, split by head, has the gradients of one process."""

from dataclasses import replace

import pytest

from tests.distributed_tests.test_data_parallel import assert_equals_one_process, gradients, job
from tests.distributed_tests.test_tensor_parallel import axes
from torchtitan.distributed.launch import run_ranks
from torchtitan.models import deepseek_v3, olmo2, qwen3

MODELS = {
    "normed heads": qwen3.FLAVORS["8B"],
    "latent queries, keys and values": replace(deepseek_v3.FLAVORS["671B"], moe=None),
    "norms over all heads, after layers": olmo2.FLAVORS["7B"],
    "latent keys and values": replace(deepseek_v3.FLAVORS["16B"], moe=None),
}
TP2, TP4 = {"tensor_parallel_degree": 2}, {"tensor_parallel_degree": 4}
NO_SP = {"enable_sequence_parallel": False}
LAYOUTS = {
    "fsdp2": (2, job(), 1),
    "tp2": (2, job(tp=TP2), 1),
    "tp2, no sp": (2, job(tp=TP2 | NO_SP), 1),
    "tp4, accumulate": (4, job(tp=TP4), 2),
    "fsdp2 x tp2, full ac": (4, job(tp=TP2, ac="full"), 1),
    "fsdp2 x tp2, by-op ac": (4, job(tp=TP2, ac="selective", selective_ac_option="op"), 1),
    "tp2, compile": (2, job(tp=TP2, compiled=True), 1),
    "tp2, no sp, compile, by-op ac": (
        2,
        job(tp=TP2 | NO_SP, compiled=True, ac="selective", selective_ac_option="op"),
        1,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def reference(request):
    config = replace(MODELS[request.param].shrunk(4), n_layers=2, seq_len=8)
    return config, run_ranks(gradients, 1, config, job())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_process(reference, name):
    assert_equals_one_process(reference, LAYOUTS[name])


@pytest.mark.parametrize("name", MODELS)
def test_all_parameters_are_on_one_mesh(name):
    """Clipping and the optimizer use foreach kernels on GPUs, which take one mesh at a time."""
    config = replace(MODELS[name].shrunk(2), n_layers=1, seq_len=8)
    for found in run_ranks(axes, 2, config, job(tp=TP2)):
        assert set(found.values()) == {("fsdp", "tp")}
