"""Every schedule of a pipeline has the weights and gradients of one process."""

from dataclasses import replace

import pytest
import torch.distributed as dist

from tests.distributed_tests.test_data_parallel import (
    CPU,
    SEQUENCES,
    assert_equal_on_all_ranks,
    global_batch,
    job,
    tiny,
    whole,
)
from torchtitan.build import build_model
from torchtitan.config.pipeline_faults import pipeline_faults
from torchtitan.data.batch import IGNORE_INDEX, Batch
from torchtitan.distributed.context_parallel import sequence_part
from torchtitan.distributed.fsdp import Precision
from torchtitan.distributed.grad_norm import global_grad_norm
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.mesh import Degrees
from torchtitan.distributed.styles import loss_layout
from torchtitan.models.moe.config import MoEConfig

LENGTHS = [[3, 5], [8], [1, 1, 6]] * (SEQUENCES // 3)


def batch_of(slots):
    tokens, labels = (x[slots.start : slots.stop] for x in global_batch())
    valid = int((labels != IGNORE_INDEX).sum())
    return Batch(tokens, labels, LENGTHS[slots.start : slots.stop], valid, exhausted=False)


def gradients(model_config, config):
    """As test_data_parallel.gradients, of what this rank holds; and of validation the summed loss."""
    degrees = Degrees.resolve(config.parallelism, dist.get_world_size())
    precision = Precision.resolve(config, CPU)
    model = build_model(model_config, degrees, precision, config, CPU)
    batch = batch_of(degrees.slots(dist.get_rank(), SEQUENCES))
    batch = batch.cut(sequence_part(config.parallelism, degrees, dist.get_rank()))
    valid = batch_of(range(SEQUENCES)).num_valid_tokens
    with loss_layout(degrees.tp, config.parallelism):
        rows = range(len(batch.tokens))
        total = model.forward_backward(batch, rows, valid, config.training)
        norm, total = global_grad_norm(model.parameters(), total / degrees.tp, degrees.stage_size)
        named = list(model.named_parameters())
        weights = {name: whole(p) for name, p in named}
        grads = {name: whole(p.grad) for name, p in named}
        model.train(False)
        evaluated = model.loss(batch) / valid / degrees.tp
        dist.all_reduce(evaluated)
    assert evaluated.item() == pytest.approx(total.item(), rel=1e-6)
    return weights, grads, total.item(), norm.item()


def gradients_of_all(model_config, configs):
    return [gradients(model_config, config) for config in configs]


def pipelined(ranks, schedule, local=SEQUENCES, size=1, seq_len=8, training=None, **more):
    parallelism = {
        key: more.pop(key)
        for key in list(more)
        if key.endswith("_degree") or key in ("enable_sequence_parallel", "module_fqns_per_model_part")
    }
    options = {f"pipeline_parallel_{key}": more.pop(key) for key in list(more) if key in PIPELINE}
    degrees = {
        "pipeline_parallel_degree": ranks,
        "pipeline_parallel_schedule": schedule,
        "pipeline_parallel_microbatch_size": size,
    }
    batch = {"local_batch_size": local, "seq_len": seq_len, "global_batch_size": SEQUENCES}
    batch |= {"mixed_precision_param": "float32"} | (training or {})
    return job(training=batch, tp=degrees | parallelism | options, **more)


ALONE = {
    "local_batch_size": SEQUENCES,
    "global_batch_size": SEQUENCES,
    "mixed_precision_param": "float32",
}
PIPELINE = ("layers_per_stage", "first_stage_less_layers", "last_stage_less_layers", "schedule_csv")


def merged(ranks, degrees_of_stage):
    """One result from those of all stages: each rank has its own parameters."""
    weights, grads = {}, {}
    for rank in ranks[::degrees_of_stage]:
        assert not weights.keys() & rank[0].keys()
        weights |= rank[0]
        grads |= rank[1]
    assert len({rank[2:] for rank in ranks}) == 1
    return weights, grads, *ranks[0][2:]


@pytest.fixture(scope="module")
def references():
    known = {}

    def reference(model_config, config):
        if model_config not in known:
            alone = job(training=ALONE)
            known[model_config] = run_ranks(gradients, 1, model_config, alone)[0]
        return known[model_config]

    return reference


def check(references, model_config, config, world_size):
    assert not list(pipeline_faults(config, model_config.n_layers))
    ranks = run_ranks(gradients, world_size, model_config, config, timeout=120)
    stage_size = world_size // config.parallelism.pipeline_parallel_degree
    expected = references(model_config, config)
    result = merged(ranks, stage_size)
    assert result[0].keys() == expected[0].keys()
    assert_equal_on_all_ranks(expected, [result])


DENSE = tiny(n_layers=6, n_heads=2, n_kv_heads=2)
TIED = replace(DENSE, enable_weight_tying=True)
PACKED = replace(DENSE, attn_mask_type="block_causal")
MOE = replace(
    tiny(n_layers=4, n_heads=4, n_kv_heads=4, dim=24, n_dense_layers=1),
    moe=MoEConfig(
        num_experts=8,
        top_k=2,
        ffn_dim=12,
        num_shared_experts=1,
        load_balance_coeff=1e-3,
        sequence_balance_coeff=0.1,
        router_z_coeff=0.01,
    ),
)
SPLITTING = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
LOOPED = ("LoopedBFS", "Interleaved1F1B", *SPLITTING)


def stages_of(count):
    """The six layers in so many stages, the ends by themselves where there are more stages."""
    names = ["tok_embeddings", *(f"layers.{i}" for i in range(6)), "norm", "output"]
    cuts = [round(i * len(names) / count) for i in range(count + 1)]
    return {"module_fqns_per_model_part": [names[a:b] for a, b in zip(cuts, cuts[1:])]}


@pytest.mark.parametrize(("ranks", "stages"), [(2, 1), (2, 2), (2, 3), (4, 1), (4, 2)])
def test_every_schedule_equals_one_process_or_is_refused(references, ranks, stages):
    counts, cut = (1, 3, 4, 12), stages_of(ranks * stages)
    schedules = ("GPipe", "1F1B", *LOOPED)
    configs = [pipelined(ranks, s, local=n, **cut) for s in schedules for n in counts]
    configs = [c for c in configs if not list(pipeline_faults(c, DENSE.n_layers))]
    assert len(configs) >= (3 * len(counts) if stages == 3 else 4 * len(counts))
    results = run_ranks(gradients_of_all, ranks, DENSE, configs, timeout=120)
    for config, *found in zip(configs, *results, strict=True):
        assert_equal_on_all_ranks(references(DENSE, config), [merged(found, 1)])


def test_what_runs_and_what_is_refused():
    """The table of the test above: microbatches that run, by schedule, ranks and stages a rank."""
    runs = {}
    for schedule in ("GPipe", "1F1B", *LOOPED):
        for ranks, stages in ((2, 1), (2, 2), (4, 1), (4, 2)):
            cut = stages_of(ranks * stages)
            configs = {n: pipelined(ranks, schedule, local=n, **cut) for n in range(1, 10)}
            legal = [n for n, c in configs.items() if not list(pipeline_faults(c, DENSE.n_layers))]
            runs[schedule, ranks, stages] = legal
    everything = list(range(1, 10))
    for schedule in ("GPipe", "1F1B"):
        assert runs[schedule, 2, 2] == runs[schedule, 4, 2] == []  # one stage a rank
    assert runs["GPipe", 2, 1] == runs["GPipe", 4, 1] == everything
    assert runs["1F1B", 2, 1] == everything[1:] and runs["1F1B", 4, 1] == everything[3:]
    assert all(runs["LoopedBFS", r, s] == everything for r in (2, 4) for s in (1, 2))
    for schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        for stages in (1, 2):
            assert runs[schedule, 2, stages] == [1, 2, 3, 4, 6, 8]
            assert runs[schedule, 4, stages] == [1, 2, 3, 4, 5, 6, 7, 8]
    for schedule in ("ZBVZeroBubble", "DualPipeV"):
        assert runs[schedule, 2, 1] == runs[schedule, 4, 1] == []  # two stages a rank
    assert runs["ZBVZeroBubble", 2, 2] == runs["ZBVZeroBubble", 4, 2] == everything
    assert runs["DualPipeV", 2, 2] == everything[3:] and runs["DualPipeV", 4, 2] == everything[7:]


FULL, SECOND, BY_OP = (
    {"ac": "full"},
    {"ac": "selective", "selective_ac_option": "2"},
    {"ac": "selective", "selective_ac_option": "op"},
)
EACH = {"training": {"sync_gradients_each_microbatch": True}}
TWO_RANKS = {
    "two sequences a microbatch": (DENSE, pipelined(2, "1F1B", local=6, size=2)),
    "packed documents": (PACKED, pipelined(2, "Interleaved1F1B", local=4)),
    "tied": (TIED, pipelined(2, "1F1B", local=4)),
    "tied, both ends on one rank": (TIED, pipelined(2, "ZBVZeroBubble", local=4)),
    "layers a stage": (DENSE, pipelined(2, "Interleaved1F1B", local=4, layers_per_stage=2)),
    "the ends apart": (DENSE, pipelined(2, "LoopedBFS", local=4, layers_per_stage=1)),
    "full ac, split backward": (DENSE, pipelined(2, "InterleavedZeroBubble", local=4, **FULL)),
    "by-op ac": (DENSE, pipelined(2, "Interleaved1F1B", local=4, **BY_OP)),
    "compile": (DENSE, pipelined(2, "1F1B", local=4, compiled=True, **FULL)),
    **{
        f"moe, {schedule}, ac {ac.get('ac', 'none')}": (MOE, pipelined(2, schedule, local=6, **ac))
        for schedule in ("1F1B", *SPLITTING)
        for ac in ({}, FULL, SECOND)
    },
}


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_equal_one_process(references, name):
    check(references, *TWO_RANKS[name], 2)


def spread(schedule, world_size, model=MOE, shard=-1, local=3, **more):
    config = pipelined(2, schedule, local=local, **more)
    parallelism = replace(config.parallelism, data_parallel_shard_degree=shard)
    return model, replace(config, parallelism=parallelism), world_size


SPREAD = {
    "fsdp2": spread("1F1B", 4, DENSE),
    "fsdp2, reduce each": spread("1F1B", 4, DENSE, **EACH),
    "fsdp2, always reshard": spread("GPipe", 4, DENSE, reshard="always"),
    "fsdp2, always reshard, looped": spread("LoopedBFS", 4, DENSE, reshard="always"),
    "fsdp2, always reshard, interleaved": spread("Interleaved1F1B", 4, DENSE, local=2, reshard="always"),
    "fsdp2, never reshard": spread("1F1B", 4, DENSE, reshard="never"),
    "fsdp2, split backward": spread("InterleavedZeroBubble", 4, DENSE),
    "fsdp2, tied": spread("1F1B", 4, TIED),
    "fsdp2, tied, both ends on one rank": spread("ZBVZeroBubble", 4, TIED),
    "fsdp2, dual pipe": spread("DualPipeV", 4, MOE, local=6, **FULL),
    "fsdp2, offload": spread("1F1B", 4, DENSE, training={"enable_cpu_offload": True}),
    "hsdp2x2": spread("ZBVZeroBubble", 8, DENSE, replicate=2),
    "tp2": spread("1F1B", 4, MOE, tensor_parallel_degree=2),
    "tp2, tied, no sp": spread(
        "Interleaved1F1B", 4, TIED, tensor_parallel_degree=2, enable_sequence_parallel=False
    ),
    "tp2, split backward": spread("InterleavedZeroBubble", 4, tensor_parallel_degree=2, **FULL),
    "cp2, packed documents": spread("1F1B", 4, PACKED, context_parallel_degree=2),
    "cp2 x tp2, split backward": spread(
        "ZBVZeroBubble", 8, MOE, context_parallel_degree=2, tensor_parallel_degree=2, **FULL
    ),
    "cp2, the ends apart": spread(
        "LoopedBFS", 4, DENSE, context_parallel_degree=2, layers_per_stage=1
    ),
    "ep2": spread("1F1B", 4, expert_parallel_degree=2),
    "ep2, by-op ac": spread("Interleaved1F1B", 4, expert_parallel_degree=2, **BY_OP),
    "ep2, split backward": spread("ZBVZeroBubble", 4, expert_parallel_degree=2, **FULL),
    "tp2 ep2, no sp": spread(
        "ZBVZeroBubble",
        4,
        tensor_parallel_degree=2,
        expert_parallel_degree=2,
        enable_sequence_parallel=False,
    ),
    "fsdp2 x tp2 ep4": spread(
        "InterleavedZeroBubble", 8, tensor_parallel_degree=2, expert_parallel_degree=4, **FULL
    ),
}


@pytest.mark.parametrize("name", SPREAD)
def test_pipelines_of_other_layouts_equal_one_process(references, name):
    check(references, *SPREAD[name])


def test_a_schedule_from_a_file(references, tmp_path):
    """Two stages a rank, side by side; microbatches go backward in the order 2, 0, 1."""
    path = tmp_path / "schedule.csv"
    rows = [(0, 1), (2, 3)]
    forward = [[f"{s}F{m}" for m in range(3) for s in row] for row in rows]
    backward = [[f"{s}B{m}" for m in (2, 0, 1) for s in row[::-1]] for row in rows]
    path.write_text("\n".join(",".join([*f, "", *b]) for f, b in zip(forward, backward)))
    config = pipelined(2, "PipelineScheduleMulti", local=3, schedule_csv=str(path))
    check(references, TIED, config, 2)


def test_gradients_of_bfloat16_microbatches_add_up_in_float32():
    """With a split backward as with a whole one, to which they are equal but for the order of sums."""
    bfloat16 = {"mixed_precision_param": "bfloat16"}
    whole_ranks, split_ranks = (
        run_ranks(gradients, 2, DENSE, pipelined(2, schedule, training=bfloat16), timeout=120)
        for schedule in ("Interleaved1F1B", "InterleavedZeroBubble")
    )
    expected, found = merged(whole_ranks, 1)[1], merged(split_ranks, 1)[1]
    for name, grad in expected.items():
        assert (found[name] - grad).norm() < 1e-5 * grad.norm(), name
