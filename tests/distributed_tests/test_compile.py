"""What compilation does to a model: graphs that equal blocks share, and a budget of memory."""

from dataclasses import replace

import pytest
from torch._dynamo.utils import counters

from tests.distributed_tests.test_data_parallel import (
    build,
    global_batch,
    job,
    num_bytes,
    saved_tensors,
    tiny,
    whole,
)
from torchtitan.config.schema import Compile
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.styles import loss_layout


def graphs(config, n_layers):
    """How many graphs the compiler makes for a model, recompilations included, over two steps."""
    degrees, model = build(tiny(n_layers=n_layers, n_heads=2, n_kv_heads=2), config)
    tokens, labels = global_batch()
    with loss_layout(degrees.tp, config.parallelism):
        for _ in range(2):
            model(tokens, labels).backward()
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


COMPILED = {
    "fsdp2": (2, job(compiled=True)),
    "tp2": (2, job(compiled=True, tp={"tensor_parallel_degree": 2})),
    "full ac": (1, job(compiled=True, ac="full")),
    "by-op ac": (1, job(compiled=True, ac="selective", selective_ac_option="op")),
}


@pytest.mark.parametrize("name", COMPILED)
def test_equal_blocks_share_one_graph(name):
    """Else the time of a first step would grow with depth. The second graph is the loss."""
    world_size, config = COMPILED[name]
    assert run_ranks(graphs, world_size, config, 4, timeout=180) == [2] * world_size


def budgeted(config):
    """Bytes kept for backward, and the gradients."""
    _, model = build(tiny(n_layers=1), config)
    with saved_tensors(model) as kept:
        loss = model(*global_batch())
    loss.backward()
    return num_bytes(kept), {name: whole(p.grad) for name, p in model.named_parameters()}


def test_a_smaller_memory_budget_keeps_less():
    """By inductor, as a run does; some 10 s a budget."""
    _, expected = run_ranks(budgeted, 1, job())[0]
    kept = []
    for budget in (0.0, 0.5, 1.0):
        config = job(ac="memory_budget", memory_budget=budget)
        config = replace(config, compile=Compile(enable=True, components=["model"]))
        size, gradients = run_ranks(budgeted, 1, config, timeout=180)[0]
        kept.append(size)
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name
    assert kept[0] < kept[1] < kept[2], kept
