"""Rows are on their way while shared experts compute, forward and backward, and gradients stay right."""

from dataclasses import replace
from unittest.mock import patch

import pytest

from tests.distributed_tests import test_pipeline as pipeline
from tests.distributed_tests.test_data_parallel import (
    SEQUENCES,
    assert_equal_on_all_ranks,
    build,
    global_batch,
    job,
)
from tests.distributed_tests.test_moe_layouts import BY_OP, FULL, gradients_of_all, moe, parallel
from torchtitan import routing
from torchtitan.distributed.expert_parallel import exchange
from torchtitan.distributed.launch import run_ranks

SHARED = moe(load_balance_coeff=1e-3, sequence_balance_coeff=0.1)
ALONE = replace(SHARED, moe=replace(SHARED.moe, num_shared_experts=0))
"""Of routed experts alone."""

FORWARD = ["launch", "sort", "landed", "launch", "shared", "landed", "launch", "landed"]
"""Of counts, while rows are sorted; of rows, while shared experts compute; of what experts return."""
BACKWARD = ["launch", "landed", "launch", "shared", "landed"]
RECOMPUTED = ["sort", *FORWARD[3:]]


def events(config, model_config):
    """What one MoE layer did in forward and in backward, in order."""
    _, model = build(replace(model_config, n_layers=2), config)
    seen = []

    def told(owner, name, event):
        function = getattr(owner, name)

        def call(*args):
            seen.append(event)
            return function(*args)

        return patch.object(owner, name, call)

    shared = model.layers["1"].moe.shared_experts
    if shared is not None:
        shared.register_forward_hook(lambda *_: seen.append("shared"))
        shared.register_full_backward_hook(lambda *_: seen.append("shared"))
    watched = (
        told(exchange, "launch", "launch"),
        told(exchange, "landed", "landed"),
        told(routing, "sort_by_expert", "sort"),
    )
    with watched[0], watched[1], watched[2]:
        loss = model(*global_batch())
        forward = seen.copy()
        loss.backward()
    return forward, seen[len(forward) :]


def events_of_all(configs, model_config):
    return [events(config, model_config) for config in configs]


EVENTS = {
    "ep2": (parallel(ep=2), BACKWARD),
    "full ac": (parallel(ep=2, **FULL), RECOMPUTED + BACKWARD),
    "by-op ac": (parallel(ep=2, **BY_OP), BACKWARD),
    "compile": (parallel(ep=2, compiled=True), BACKWARD),
    "compile, full ac": (parallel(ep=2, compiled=True, **FULL), RECOMPUTED + BACKWARD),
    "tp2, no sp": (parallel(2, 2, sp=False), BACKWARD),
    "tp2": (parallel(2, 2), BACKWARD),
}


@pytest.mark.parametrize("model", [SHARED, ALONE], ids=["shared", "alone"])
def test_all_fly_while_others_compute(model):
    """Counts while rows are sorted, rows and their gradients while shared experts compute."""
    for rank in run_ranks(events_of_all, 2, [config for config, _ in EVENTS.values()], model):
        for name, (forward, backward), (_, expected) in zip(EVENTS, rank, EVENTS.values(), strict=True):
            expected = [FORWARD, expected]
            if model is ALONE:
                expected = [[e for e in part if e != "shared"] for part in expected]
            assert [forward, backward] == expected, name


RECOMPUTING = {"none": {}, "by-op ac": BY_OP, "full ac": FULL}
LAYOUTS = {
    "ep2": (2, {"ep": 2}),
    "tp2 ep2": (2, {"tp": 2, "ep": 2}),
    "tp2 ep2, no sp": (2, {"tp": 2, "ep": 2, "sp": False}),
    "fsdp2 x ep2": (4, {"ep": 2}),
}


def gradients_of_configs(configs, model):
    return [gradients_of_all([model], config)[0] for config in configs]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_without_shared_experts_equal_one_process(name):
    """With them: test_moe_layouts.py."""
    world_size, degrees = LAYOUTS[name]
    [reference] = run_ranks(gradients_of_all, 1, [ALONE], parallel())[0]
    configs = [parallel(**degrees, **options) for options in RECOMPUTING.values()]
    ranks = run_ranks(gradients_of_configs, world_size, configs, ALONE, timeout=180)
    for i in range(len(configs)):
        assert_equal_on_all_ranks(reference, [rank[i] for rank in ranks])


PIPELINED = [
    replace(pipeline.MOE, moe=replace(pipeline.MOE.moe, num_shared_experts=shared)) for shared in (0, 1)
]


@pytest.fixture(scope="module")
def stages():
    alone = job(training=pipeline.ALONE)
    return {model: run_ranks(pipeline.gradients, 1, model, alone)[0] for model in PIPELINED}


@pytest.mark.parametrize("model", PIPELINED, ids=["alone", "shared"])
@pytest.mark.parametrize(
    ("schedule", "recomputing"),
    [*(("1F1B", name) for name in RECOMPUTING), ("ZBVZeroBubble", "none"), ("ZBVZeroBubble", "full ac")],
)
def test_gradients_of_a_pipeline_equal_one_process(stages, model, schedule, recomputing):
    """Whose backward may be split in two."""
    options = {"expert_parallel_degree": 2} | RECOMPUTING[recomputing]
    config = pipeline.pipelined(2, schedule, local=SEQUENCES // 2, **options)
    pipeline.check(lambda *_: stages[model], model, config, 4)
