"""A dry run tells what real ranks do: parameters, memory, collectives by kind and axis."""

import time
from itertools import accumulate
from unittest import mock

import pytest
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tests.distributed_tests.test_training import COMMON, build
from torchtitan import dry_run
from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.distributed.fake import CollectiveCounter
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.local_parts import local_part
from torchtitan.optim.state import held_tensors
from torchtitan.trainer import Trainer

SMALL = COMMON | {"training.local_batch_size": 6}
TP2 = {"parallelism.tensor_parallel_degree": 2}
CP2 = {"parallelism.context_parallel_degree": 2}
PP2 = {"parallelism.pipeline_parallel_degree": 2}
MOE = {
    "model.name": "qwen3",
    "model.flavor": "debugmodel_moe",
    "model.overrides.n_layers": 3,
    "parallelism.expert_parallel_degree": 2,
    "training.local_batch_size": 3,
}


LARGER = SMALL | {"model.overrides.dim": 128, "model.overrides.ffn_dim": 256, "training.seq_len": 128}
RECOMPUTED = {"activation_checkpoint.mode": "full"}
COMPILED = {"compile.enable": True, "compile.backend": dry_run._COMPILER}
EP2 = MOE | {"debug.moe_force_load_balance": True}
MLA = {
    "model.name": "deepseek_v3",
    "model.overrides.n_heads": 4,
    "model.overrides.n_kv_heads": 4,
    "training.seq_len": 512,
    "training.global_batch_size": 2,
    "training.local_batch_size": 2,
    "debug.moe_force_load_balance": True,
}


def arguments(settings):
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items()]


def be_one(settings, rank, world_size):
    config, model, degrees, _ = dry_run._settle(load_config(arguments(settings)), world_size)
    dist.destroy_process_group()
    return dry_run._be(config, model, degrees, rank, world_size)


def dry(settings, rank, world_size):
    return run_ranks(be_one, 1, settings, rank, world_size, timeout=120)[0]


class CountingTrainer(Trainer):
    def _forward_backward(self, batch, num_tokens):
        with CollectiveCounter() as self.counter:
            return super()._forward_backward(batch, num_tokens)


def train(settings):
    """Collectives of a second step's forward and backward; local parameters."""
    trainer = build(settings, CountingTrainer)
    trainer.run()
    counter = trainer.counter
    counts = {key: (n, counter.bytes[key]) for key, n in counter.calls.items() if len(key[1]) > 1}
    local = (getattr(p, "_local_tensor", p) for p in trainer.model.parameters())
    return counts, sum(tensor.numel() for tensor in local)


@pytest.mark.parametrize(
    ("world_size", "layout"), [(4, TP2), (4, CP2), (4, PP2), (2, {})], ids=["tp2", "cp2", "pp2", "fsdp2"]
)
def test_real_ranks_do_what_a_dry_run_says(tmp_path, world_size, layout):
    settings = SMALL | layout | {"job.dump_folder": tmp_path, "training.steps": 2}
    ranks = run_ranks(train, world_size, settings, timeout=120)
    for rank in range(0, world_size, world_size // layout.get("parallelism.pipeline_parallel_degree", 1)):
        report = dry(settings, rank, world_size)
        counts, num_parameters = ranks[rank]
        assert report.num_parameters == num_parameters
        assert report.bytes["weights"] == report.bytes["gradients"] == 4 * num_parameters
        said = sorted(
            (row.kind, row.calls, row.bytes)
            for row in report.traffic
            if not (row.axis.startswith("world") and row.kind == "all_reduce")  # norm and load
        )
        assert said == sorted((kind, *numbers) for (kind, _), numbers in counts.items())


class MeasuringTrainer(Trainer):
    peak = float("inf")

    def _forward_backward(self, batch, num_tokens):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = super()._forward_backward(batch, num_tokens)
        events = profiler.profiler.kineto_results.events()
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        if self.step > 1:  # the first one makes what later ones have
            # The least of some: gloo lets go of what it has sent when it comes to it.
            self.peak = min(self.peak, max(accumulate(size for _, size in memory)))
        return loss


def measure(settings):
    """The most bytes in use in a step's forward and backward, by PyTorch's allocator."""
    trainer = build(settings, MeasuringTrainer)
    trainer.run()
    held = [*trainer.model.parameters(), *held_tensors(trainer.optimizer.state)]
    return trainer.peak + sum(local_part(tensor).nbytes for tensor in held)


def be_one_on_cpus(settings, rank, world_size):
    with mock.patch.object(dry_run, "_count_as_on_gpus"):
        return be_one(settings, rank, world_size)


@pytest.mark.parametrize(
    ("world_size", "layout", "least", "most"),
    [
        (1, {}, 0.99, 1.01),
        (1, RECOMPUTED, 0.99, 1.01),
        (1, COMPILED, 0.99, 1.01),
        (2, {}, 0.99, 1.01),
        (2, TP2, 0.9, 1.01),
        (2, PP2, 0.98, 1.05),
        (2, EP2, 0.75, 1.01),  # experts take and free inside of their operator; gloo keeps rows it has sent
        (1, MLA, 0.9, 1.01),
    ],
    ids=["one", "recomputed", "compiled", "fsdp2", "tp2", "pp2", "ep2", "mla"],
)
def test_memory_is_what_real_ranks_take(tmp_path, world_size, layout, least, most):
    settings = LARGER | layout | {"job.dump_folder": tmp_path, "training.steps": 24}
    taken = run_ranks(measure, world_size, settings, timeout=120)[0]
    said = run_ranks(be_one_on_cpus, 1, settings, 0, world_size, timeout=120)[0].peak_bytes
    assert least < said / taken < most


@pytest.mark.parametrize("mode", ["none", "full"])
def test_rows_travel_twice_each_way_and_counts_once(mode):
    """Also where layers are recomputed: but for the rows, which are sent again with full recomputation."""
    report = dry(SMALL | MOE | {"activation_checkpoint.mode": mode}, 0, 4)
    [exchanges] = [row.calls for row in report.traffic if row.kind == "all_to_all"]
    assert exchanges == 3 * (5 if mode == "none" else 7)


def test_compiled_blocks_may_hold_constants():
    """As attention with sinks does."""
    by_op = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
    report = dry(SMALL | TP2 | by_op | {"model.name": "gpt_oss", "compile.enable": True}, 0, 2)
    assert report.peak_bytes > sum(report.bytes.values())


def test_512_ranks_are_no_more_work_than_one():
    layout = {"parallelism.expert_parallel_degree": 32} | TP2
    start = time.monotonic()
    report = dry(SMALL | MOE | layout | {"training.global_batch_size": -1}, 0, 512)
    assert {row.axis for row in report.traffic} == {"world", "fsdp", "tp", "ep", "efsdp"}
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("name", "bytes_a_parameter"), [("AdamW8bit", (2, 8)), ("Muon", (4, 8))])
def test_state_is_counted_as_the_optimizer_keeps_it(name, bytes_a_parameter):
    """Between that of a large matrix and that of a norm's weight."""
    report = dry(SMALL | TP2 | {"optimizer.name": name}, 0, 4)
    least, most = (size * report.num_parameters for size in bytes_a_parameter)
    assert least < report.bytes["optimizer state"] < most
    exchanges = {row.axis for row in report.traffic if row.kind == "all_to_all"}
    assert exchanges == ({"fsdp", "tp"} if name == "Muon" else set())


@pytest.mark.parametrize(("batch", "bytes_a_gradient"), [(12, 2), (6, 4)], ids=["one", "two microbatches"])
def test_copies_that_one_rank_keeps_are_counted_and_gradients_as_they_are(batch, bytes_a_gradient):
    bfloat16 = {"training.mixed_precision_param": "bfloat16", "training.local_batch_size": batch}
    report = dry(SMALL | bfloat16, 0, 1)
    assert report.bytes["weights"] == (4 + 2) * report.num_parameters
    assert report.bytes["gradients"] == bytes_a_gradient * report.num_parameters


def test_all_that_cannot_work_is_said():
    config = load_config(arguments(SMALL | {"parallelism.tensor_parallel_degree": 3, "training.seq_len": 31}))
    with pytest.raises(ConfigError) as error:
        list(dry_run.dry_run(config, 4))
    settings = {fault.setting for fault in error.value.faults}
    assert {"parallelism.tensor_parallel_degree", "training.seq_len"} <= settings


def test_the_report_is_readable():
    lines = list(dry_run.dry_run(load_config(arguments(SMALL | PP2)), 4))
    assert lines[1].startswith("4 ranks that are not there: dp_shard 2, pp 2")
    assert sum(line.startswith("rank ") for line in lines) == 2
    assert "two steps of 2 ranks" in lines[-1]
