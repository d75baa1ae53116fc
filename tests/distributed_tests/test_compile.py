"""What compilation does to a model: graphs that equal blocks share, and a budget of memory."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from tests.distributed_tests.test_data_parallel import (
    CPU,
    build,
    global_batch,
    gradients,
    job,
    num_bytes,
    saved_tensors,
    tiny,
    whole,
)
from torchtitan.config.schema import Compile
from torchtitan.distributed.context_parallel import sequence_part
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.styles import loss_layout
from torchtitan.models.moe.config import MoEConfig


def graphs(config, n_layers):
    """How many graphs the compiler makes for a model, recompilations included, over two steps."""
    degrees, model = build(tiny(n_layers=n_layers, n_heads=2, n_kv_heads=2), config)
    part = sequence_part(config.parallelism, degrees, dist.get_rank())
    tokens, labels = (part.cut(x) for x in global_batch())
    with loss_layout(degrees.tp, config.parallelism):
        for _ in range(2):
            model(tokens, labels).backward()
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


BFLOAT16 = {"mixed_precision_param": "bfloat16"}
COMPILED = {
    "fsdp2": (2, job(compiled=True), 1),
    "tp2": (2, job(compiled=True, tp={"tensor_parallel_degree": 2}), 2),
    "cp2": (2, job(compiled=True, tp={"context_parallel_degree": 2}), 1),
    "full ac": (1, job(compiled=True, ac="full"), 1),
    "by-op ac": (1, job(compiled=True, ac="selective", selective_ac_option="op"), 1),
    "one rank, bfloat16": (1, job(compiled=True, training=BFLOAT16), 1),
}


@pytest.mark.parametrize("name", COMPILED)
def test_equal_blocks_share_one_graph(name):
    """Else the time of a first step would grow with depth. A second graph is the loss of split logits."""
    world_size, config, expected = COMPILED[name]
    assert run_ranks(graphs, world_size, config, 4, timeout=180) == [expected] * world_size


def moe_graphs(config, n_layers, n_steps):
    """Graphs and graph breaks after each step of a model with experts, whose routing varies."""
    model_config = replace(EXPERTS, n_layers=n_layers)
    degrees, model = build(model_config, config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    seen = []
    with loss_layout(degrees.tp, config.parallelism):
        for _ in range(n_steps):
            tokens = torch.randint(54, (2, 8), generator=generator)
            model(tokens, tokens).backward()
            routed = {tuple(layer.moe.tokens_per_expert.tolist()) for layer in list(model.layers.values())[1:]}
            seen.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert len(routed) == n_layers - 1  # no two layers and steps had the same load
    return seen


EXPERTS = tiny(
    n_heads=2,
    n_kv_heads=2,
    moe=MoEConfig(num_experts=4, top_k=2, ffn_dim=12, num_shared_experts=1),
    n_dense_layers=1,
)
BY_OP = {"ac": "selective", "selective_ac_option": "op"}
EP2 = {"expert_parallel_degree": 2}
EP2_TP2 = EP2 | {"tensor_parallel_degree": 2, "enable_sequence_parallel": False}
MOE_GRAPHS = {
    "one rank": (1, job(compiled=True), 2),
    "one rank, bfloat16": (1, job(compiled=True, training=BFLOAT16), 2),
    "fsdp2, by-op ac": (2, job(compiled=True, **BY_OP), 2),
    "ep2": (2, job(compiled=True, tp=EP2), 5),
    "ep2, full ac": (2, job(compiled=True, tp=EP2, ac="full"), 5),
    "tp2 ep2, no sp": (2, job(compiled=True, tp=EP2_TP2), 8),
}


@pytest.mark.parametrize("name", MOE_GRAPHS)
def test_layers_with_experts_need_few_graphs_whatever_the_routing(name):
    """One is the dense block, one a block with experts, which an exchange cuts into pieces.

    Tensor parallelism has one more, the loss of split logits.
    Two layers with experts need no more than one.
    """
    world_size, config, expected = MOE_GRAPHS[name]
    for seen in run_ranks(moe_graphs, world_size, config, 3, 5, timeout=180):
        assert seen == [seen[0]] * 5, "a later step compiled something"
        assert seen[0][0] == expected, seen[0]


def graphs_of_packed_steps(model_config, config, n_steps):
    """Graphs after each step; documents and routing vary, validations have batches of another shape."""
    degrees, model = build(model_config, config)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def loss(num_sequences, length):
        tokens = torch.randint(54, (num_sequences, length), generator=generator)
        lengths = [random_lengths(length, generator) for _ in tokens]
        return model(tokens, tokens, model.documents(lengths, CPU))

    seen = []
    with loss_layout(degrees.tp, config.parallelism):
        for step in range(1, n_steps + 1):
            loss(2, 8).backward()
            if step == 1 or step % 2 == 0:
                model.eval()
                with torch.no_grad():
                    loss(3, 6)
                model.train()
            seen.append(counters["stats"]["unique_graphs"])
    return seen


def random_lengths(length, generator):
    """Documents that fill a sequence, from one to as many as it has tokens."""
    is_last = torch.rand(length, generator=generator) < torch.rand((), generator=generator)
    is_last[-1] = True
    ends = is_last.nonzero().flatten() + 1
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


PACKED = {
    "dense": (1, tiny(n_layers=2, n_heads=2, n_kv_heads=2), job(compiled=True)),
    "experts, ep2": (2, EXPERTS, job(compiled=True, tp=EP2)),
    "experts, fsdp2, by-op ac": (2, EXPERTS, job(compiled=True, **BY_OP)),
}


@pytest.mark.parametrize("name", PACKED)
def test_nothing_is_compiled_after_three_steps_whatever_documents_and_validations(name):
    world_size, model_config, config = PACKED[name]
    model_config = replace(model_config, attn_mask_type="block_causal")
    for seen in run_ranks(graphs_of_packed_steps, world_size, model_config, config, 8, timeout=180):
        assert seen == seen[:3] + [seen[2]] * 5, "a later step compiled something"


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


def loss_and_cache_hits(config):
    """Of this rank: the loss of one global batch, and graphs taken from the cache on disk."""
    *_, loss, norm = gradients(tiny(n_layers=1, n_heads=2, n_kv_heads=2), config)
    return loss, norm, counters["aot_autograd"]["autograd_cache_hit"]


def test_a_warm_cache_gives_every_rank_its_own_code(tmp_path, monkeypatch):
    """Graphs of a loss split over the vocabulary differ in nothing but the place of a rank's part."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = job(tp={"tensor_parallel_degree": 2})
    compiled = replace(config, compile=Compile(enable=True, components=["loss"]))
    plain, cold, warm = (
        run_ranks(loss_and_cache_hits, 2, c, timeout=180) for c in (config, compiled, compiled)
    )
    assert [hits for *_, hits in (*cold, *warm)] == [0, 0, 1, 1]
    for (loss, norm, _), *others in zip(plain, cold, warm, strict=True):
        for other in others:
            assert other[:2] == pytest.approx((loss, norm), rel=1e-5)
