"""Every layout with tensor parallelism has the weights and gradients of one process."""

import pytest

from tests.distributed_tests.test_data_parallel import (
    assert_equals_one_process,
    build,
    gradients,
    job,
    tiny,
)
from torchtitan.distributed.launch import run_ranks

TP2 = {"tensor_parallel_degree": 2}
WHOLE = TP2 | {"enable_sequence_parallel": False}
LAYOUTS = {
    "tp2": (2, job(tp=TP2), 1),
    "tp4": (4, job(tp={"tensor_parallel_degree": 4}), 1),
    "tp2, no sp": (2, job(tp=WHOLE), 1),
    "tp2, whole logits": (2, job(tp=TP2 | {"disable_loss_parallel": True}), 1),
    "tp2, no sp, whole logits": (2, job(tp=WHOLE | {"disable_loss_parallel": True}), 1),
    "fsdp2 x tp2": (4, job(tp=TP2), 1),
    "fsdp2 x tp2, no sp": (4, job(tp=WHOLE), 1),
    "replicate2 x tp2": (4, job(2, tp=TP2), 1),
    "hsdp2x2 x tp2": (8, job(2, tp=TP2), 1),
    "fsdp3 x tp2, accumulate": (6, job(tp=TP2), 2),
    "tp2, accumulate": (2, job(tp=TP2), 3),
    "tp2, full ac": (2, job(tp=TP2, ac="full"), 1),
    "tp2, by-op ac": (2, job(tp=TP2, ac="selective", selective_ac_option="op"), 1),
    "tp2, every second layer ac": (2, job(tp=TP2, ac="selective", selective_ac_option="2"), 1),
    "tp2, compile": (2, job(tp=TP2, compiled=True), 1),
    "tp2, no sp, compile": (2, job(tp=WHOLE, compiled=True), 1),
    "fsdp2 x tp2, compile, full ac": (4, job(tp=TP2, compiled=True, ac="full"), 1),
    "fsdp2 x tp2, compile, by-op ac": (
        4,
        job(tp=TP2, compiled=True, ac="selective", selective_ac_option="op"),
        1,
    ),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def reference(request):
    config = tiny(n_heads=4, n_kv_heads=4, dim=40, enable_weight_tying=request.param)
    return config, run_ranks(gradients, 1, config, job())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_process(reference, name):
    assert_equals_one_process(reference, LAYOUTS[name])


def axes(model_config, config):
    """Mesh axes of each parameter."""
    _, model = build(model_config, config)
    return {name: p.device_mesh.mesh_dim_names for name, p in model.named_parameters()}


@pytest.mark.parametrize("tp", [TP2, WHOLE], ids=["sp", "no sp"])
def test_all_parameters_are_on_one_mesh(tp):
    """Clipping and the optimizer use foreach kernels on GPUs, which take one mesh at a time."""
    config = tiny(n_heads=4, n_kv_heads=4, dim=40)
    for found in run_ranks(axes, 2, config, job(tp=tp)):
        assert set(found.values()) == {("fsdp", "tp")}
