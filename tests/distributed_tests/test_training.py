"""One config gives the same run on any data-parallel layout, and resuming equals never stopping."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.data.batch import batch_hash
from torchtitan.data.files import write_tokens
from torchtitan.distributed.comm import BACKEND_GRACE_SECONDS, World
from torchtitan.distributed.launch import run_ranks
from torchtitan.logging import logger
from torchtitan.observability.watchdog import Watchdog
from torchtitan.optim.nonfinite import NonFinite
from torchtitan.preflight import prepare
from torchtitan.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 6
COMMON = {
    "model.flavor": "debugmodel",
    "model.overrides.dim": 32,
    "model.overrides.n_layers": 2,
    "model.overrides.n_heads": 2,
    "model.overrides.n_kv_heads": 2,
    "model.overrides.ffn_dim": 48,
    "training.seq_len": 32,
    "training.steps": STEPS,
    "training.global_batch_size": 12,
    "training.local_batch_size": 1,
    "training.mixed_precision_param": "float32",  # CPUs that are fast in bfloat16 would use it
    "lr_scheduler.warmup_steps": 2,
    "metrics.log_freq": 1,
    "debug.seed": 7,
}


class RecordingTrainer(Trainer):
    """Keeps what a run did, for comparison with another."""

    def run(self):
        self.batches, self.states = [], []
        self.initial = {name: whole(p) for name, p in self.model.named_parameters()}
        super().run()
        self.final = {name: whole(p) for name, p in self.model.named_parameters()}

    def _next_batch(self):
        batch = super()._next_batch()
        if batch is not None:
            self.batches.append(batch)
        return batch


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def build(settings, kind):
    """A trainer on this rank; settings are the command line's, True being a bare flag."""
    world = World.from_environment()
    argv = [f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items()]
    setup = prepare(load_config(argv), world.size, CPU)
    return kind(setup, world, CPU, Watchdog(World(), 0, ""))


def train(settings):
    """Run the trainer on this rank; returns (initial weights, final weights, batches)."""
    trainer = build(settings, RecordingTrainer)
    trainer.run()
    return trainer.initial, trainer.final, trainer.batches


def run(folder, world_size=1, **changes):
    """Train on `world_size` ranks: (records by step, initial and final weights, batch hashes)."""
    settings = COMMON | {"job.dump_folder": folder} | changes
    ranks = run_ranks(train, world_size, settings, timeout=120)
    # Tensor- and context-parallel neighbours and the stages of a pipeline read the same.
    stage_size = world_size // changes.get(PIPELINE, 1)
    readers = ranks[: stage_size : changes.get(TENSOR, 1) * changes.get(CONTEXT, 1)]
    hashes = [batch_hash(*shares) for shares in zip(*(batches for *_, batches in readers), strict=True)]
    initial, final = ({n: w for rank in ranks for n, w in rank[i].items()} for i in (0, 1))
    return records(folder), initial, final, hashes


def records(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines) if "loss" in record}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("reference"), **{"training.local_batch_size": 12})


TENSOR = "parallelism.tensor_parallel_degree"
CONTEXT = "parallelism.context_parallel_degree"
HEADS = {"parallelism.context_parallel_method": "heads"}
REPLICATE = "parallelism.data_parallel_replicate_degree"
PIPELINE = "parallelism.pipeline_parallel_degree"
SCHEDULE = "parallelism.pipeline_parallel_schedule"
PP2 = {PIPELINE: 2, "training.local_batch_size": 6}
ZBV = PP2 | {SCHEDULE: "ZBVZeroBubble", "training.local_batch_size": 3}
LAYOUTS = {
    "fsdp2": (2, {}),
    "fsdp3": (3, {"training.local_batch_size": 4}),
    "fsdp4": (4, {}),
    "hsdp2x2": (4, {REPLICATE: 2}),
    "replicate4": (4, {REPLICATE: 4}),
    "tp2": (2, {TENSOR: 2}),
    "hsdp2x2 x tp2": (8, {TENSOR: 2, REPLICATE: 2}),
    "fsdp2 x tp2, no sp": (4, {TENSOR: 2, "parallelism.no_enable_sequence_parallel": True}),
    "cp2": (2, {CONTEXT: 2}),
    "fsdp2 x cp2, heads": (4, {CONTEXT: 2, **HEADS, "training.local_batch_size": 2}),
    "cp2 x tp2": (4, {CONTEXT: 2, TENSOR: 2}),
    "pp2": (2, PP2),
    "pp2 x fsdp2, v": (4, ZBV),
    "accumulate 4": (1, {"training.local_batch_size": 3}),
    "1 worker": (1, {"training.local_batch_size": 12, "training.dataloader.num_workers": 1}),
    "3 workers": (2, {"training.dataloader.num_workers": 3}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_run(reference, tmp_path, name):
    world_size, changes = LAYOUTS[name]
    expected, initial, _, hashes = reference
    ours, our_initial, _, our_hashes = run(tmp_path, world_size, **changes)
    assert our_hashes == hashes
    for key, weight in initial.items():
        assert torch.equal(our_initial[key], weight), key
    assert list(ours) == list(expected) == list(range(1, STEPS + 1))
    for step, record in expected.items():
        for value in ("loss", "grad_norm"):
            assert ours[step][value] == pytest.approx(record[value], rel=1e-6), (step, value)
        assert ours[step]["n_tokens_seen"] == record["n_tokens_seen"]
        assert ours[step]["lr"] == record["lr"]


CHECKPOINTS = {
    "checkpoint.enable": True,
    "checkpoint.interval": 2,
    "checkpoint.no_last_save_model_only": True,
    "lr_scheduler.total_steps": STEPS,
}


def stop_and_resume(folder, parts, **changes):
    """Train in parts, each up to (step, on this many ranks); the hashes of all, the last weights."""
    hashes = []
    for steps, world_size, more in parts:
        settings = CHECKPOINTS | {"training.steps": steps} | changes | more
        *_, final, part = run(folder, world_size, **settings)
        hashes += part
    return hashes, final


def test_resuming_on_the_same_layout_gives_the_same_bits(tmp_path):
    expected, _, final, hashes = run(tmp_path / "whole", 2)
    parts = [(steps, 2, {}) for steps in (2, 4, 6)]
    our_hashes, our_final = stop_and_resume(tmp_path / "stopped", parts)
    assert our_hashes == hashes
    for key, weight in final.items():
        assert torch.equal(our_final[key], weight), key
    ours = records(tmp_path / "stopped")
    for value in ("loss", "lr", "n_tokens_seen"):
        assert [r[value] for r in ours.values()] == [r[value] for r in expected.values()]


RESUMED = {
    "other data-parallel degrees": [
        (2, 2, {}),
        (3, 4, {REPLICATE: 2}),
        (6, 3, {"training.dataloader.num_workers": 2}),
    ],
    "tp2, fsdp2 x cp2, one process": [(2, 2, {TENSOR: 2}), (4, 4, {CONTEXT: 2}), (6, 1, {})],
    "pp2, one process, pp2 x fsdp2": [(2, 2, PP2), (3, 1, {}), (6, 4, ZBV)],
}


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_on_another_layout_gives_the_same_curve(reference, tmp_path, name):
    expected, _, _, hashes = reference
    parts = RESUMED[name]
    our_hashes, _ = stop_and_resume(tmp_path, parts, **{"checkpoint.interval": 1})
    assert our_hashes == hashes
    for step, record in records(tmp_path).items():
        assert record["loss"] == pytest.approx(expected[step]["loss"], rel=1e-6), step


def test_a_tied_weight_moves_into_pipelines_and_out(tmp_path):
    tied = {"model.overrides.enable_weight_tying": "true"}
    expected, _, final, _ = run(tmp_path / "whole", **tied)
    parts = [(2, 2, PP2), (3, 1, {}), (5, 2, ZBV), (6, 1, {})]
    _, ours = stop_and_resume(tmp_path / "moved", parts, **tied, **{"checkpoint.interval": 1})
    for step, record in records(tmp_path / "moved").items():
        assert record["loss"] == pytest.approx(expected[step]["loss"], rel=1e-6), step
    assert ours.keys() == final.keys()


EXPERTS = {
    "model.name": "qwen3",
    "model.flavor": "debugmodel_moe",
    "model.overrides.head_dim": 16,
    "model.overrides.moe.num_experts": 8,
    "model.overrides.moe.top_k": 2,
    "model.overrides.moe.ffn_dim": 24,
}
ALL_AT_ONCE = PP2 | {
    TENSOR: 2,
    CONTEXT: 2,
    "parallelism.expert_parallel_degree": 2,  # and FSDP over the two others of a stage
    "validation.local_batch_size": 12,
}


def test_all_parallelism_checkpoints_and_validation_together_are_the_same_run(tmp_path):
    settings = EXPERTS | VALIDATION | {"validation.steps": 1, "lr_scheduler.total_steps": STEPS}
    expected, *_ = run(tmp_path / "one", **settings, **{"training.steps": 4})
    parts = [(2, 8, ALL_AT_ONCE), (3, 1, {}), (4, 8, ALL_AT_ONCE)]
    stop_and_resume(tmp_path / "all", parts, **settings)
    ours = records(tmp_path / "all")
    assert list(ours) == list(expected)
    for step, record in expected.items():
        for value in ("loss", "grad_norm"):
            assert ours[step][value] == pytest.approx(record[value], rel=1e-6), (step, value)
    held_out = by_step(tmp_path / "all")
    for step, record in by_step(tmp_path / "one").items():
        assert held_out[step]["validation_loss"] == pytest.approx(record["validation_loss"], rel=1e-6)


class PoisonedTrainer(RecordingTrainer):
    """A gradient on the last rank alone is not finite, from step 3 to `last_poisoned`."""

    last_poisoned = 3
    unchanged: dict

    def _forward_backward(self, batch, num_tokens):
        loss = super()._forward_backward(batch, num_tokens)
        self.before = snapshot(self)
        if 3 <= self.step <= self.last_poisoned and self.world.rank == self.world.size - 1:
            next(self.model.parameters()).grad.mul_(float("nan"))
        return loss

    def _train_step(self, batch):
        super()._train_step(batch)
        pairs = zip(snapshot(self), self.before, strict=True)
        self.unchanged[self.step] = all(torch.equal(now, before) for now, before in pairs)


def snapshot(trainer):
    """Weights, balance biases, moments."""
    moments = [t for state in trainer.optimizer.state.values() for t in state.values()]
    return [whole(t) for t in (*trainer.model.state_dict().values(), *moments)]


def train_poisoned(settings, last_poisoned):
    trainer = build(settings, PoisonedTrainer)
    trainer.last_poisoned, trainer.unchanged = last_poisoned, {}
    try:
        trainer.run()
    except NonFinite as error:
        return str(error), trainer.unchanged
    return "", trainer.unchanged


BALANCED = EXPERTS | {"model.overrides.moe.load_balance_coeff": 1e-2}


@pytest.mark.parametrize(("world_size", "model"), [(1, {}), (2, BALANCED)], ids=["dense", "experts"])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(tmp_path, world_size, model):
    settings = COMMON | model | {"job.dump_folder": tmp_path, "training.on_nonfinite": "skip"}
    for error, unchanged in run_ranks(train_poisoned, world_size, settings, 3):
        assert not error
        assert [step for step, same in unchanged.items() if same] == [3]


@pytest.mark.parametrize(("policy", "last_step"), [("stop", 3), ("skip", 5)])
def test_gradients_that_are_not_finite_stop_every_rank(tmp_path, policy, last_step):
    settings = COMMON | CHECKPOINTS | {
        "job.dump_folder": tmp_path,
        "training.on_nonfinite": policy,
        "training.max_skipped_steps": 2,
    }
    for error, _ in run_ranks(train_poisoned, 2, settings, STEPS):
        assert error.startswith(f"step {last_step}: ")
        assert "(the gradient of tok_embeddings.weight is the first that is not finite)" in error
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == ["step-2", "step-4"][: last_step // 2]


def train_to_a_nonfinite_output(settings, name):
    """What the run ends with, where one module of the last rank returns NaN from step 2 on."""
    trainer = build(settings, Trainer)

    def poison(module, inputs, output):
        return output * float("nan") if trainer.step >= 2 else output

    if trainer.world.rank == trainer.world.size - 1:
        dict(trainer.model.named_modules())[name].register_forward_hook(poison)
    with pytest.raises(NonFinite) as error:
        trainer.run()
    return str(error.value)


COMPILED = {"compile.enable": True, "compile.backend": "aot_eager"}
W2, ATTENTION = "layers.1.feed_forward.w2", "layers.1.attention.wo"
POISONED = {
    "fsdp2": ({}, W2, W2),
    "pp2": (PP2, W2, W2),
    "tp2": ({TENSOR: 2}, W2, W2),
    "ep2": (EXPERTS | {"parallelism.expert_parallel_degree": 2}, ATTENTION, ATTENTION),
    "compile": (COMPILED, "layers.1", "layers.1"),
    "the end": (COMPILED, "norm", "norm"),
}


@pytest.mark.parametrize("name", POISONED)
def test_the_module_where_numbers_stop_being_finite_is_named(tmp_path, name):
    changes, module, named = POISONED[name]
    settings = COMMON | changes | {"job.dump_folder": tmp_path}
    for error in run_ranks(train_to_a_nonfinite_output, 2, settings, module, timeout=120):
        assert error.startswith("step 2: loss nan")
        assert f"(the output of {named} is the first that is not finite, on rank 1)" in error


VALIDATION = {
    "validation.enable": True,
    "validation.dataset": "c4_test_validation",
    "validation.seq_len": 32,
    "validation.freq": 3,
    "validation.local_batch_size": 12,
}


VALIDATED = {
    "fsdp2": (2, {"validation.local_batch_size": 6}),
    "fsdp3": (3, {"validation.local_batch_size": 4}),
    "pp2": (2, PP2),
    "pp2, v": (2, ZBV | {"parallelism.pipeline_parallel_microbatch_size": 3}),
    "tp2": (2, {TENSOR: 2}),
    "cp2": (2, {CONTEXT: 2}),
}


@pytest.mark.parametrize(("steps", "layouts"), [(-1, ["fsdp3"]), (2, VALIDATED)])
def test_validation_is_the_same_on_every_layout_and_leaves_training_alone(
    tmp_path, steps, layouts
):
    settings = VALIDATION | {"validation.steps": steps}
    expected, _, final, _ = run(tmp_path / "one", **settings)
    losses = {step: r["validation_loss"] for step, r in by_step(tmp_path / "one").items()}
    num_tokens = validated_tokens(tmp_path / "one")
    assert list(losses) == [1, 3, 6]
    for name in layouts:
        world_size, more = VALIDATED[name]
        run(tmp_path / name, world_size, **settings | more)
        assert validated_tokens(tmp_path / name) == num_tokens
        for step, record in by_step(tmp_path / name).items():
            assert record["validation_loss"] == pytest.approx(losses[step], rel=1e-6), (name, step)
    *_, without, _ = run(tmp_path / "without")
    assert all(torch.equal(final[key], weight) for key, weight in without.items())


def test_validation_depends_on_no_batch_size(tmp_path):
    """Of documents that fill a sequence each: others are cut where the ones before them end."""
    ids = torch.randint(2048, (13, 32), generator=torch.Generator().manual_seed(0))
    write_tokens(tmp_path / "held_out.bin", ids.tolist(), 2048)
    found = []
    for batch_size in (12, 5, 1):
        settings = VALIDATION | {
            "validation.dataset": tmp_path / "held_out.bin",
            "validation.local_batch_size": batch_size,
            "training.local_batch_size": 12,
            "training.steps": 3,
        }
        folder = tmp_path / str(batch_size)
        run(folder, **settings)
        assert validated_tokens(folder) == [13 * 31] * 2
        found.append([r["validation_loss"] for r in by_step(folder).values()])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


def validated_tokens(folder):
    return [
        round(r["validation_tokens_per_second"] * r["validation_seconds"])
        for r in by_step(folder).values()
    ]


def test_every_key_of_metrics_jsonl_is_documented(tmp_path):
    one_step = {"training.steps": 1, "validation.steps": 1}
    run(tmp_path, **VALIDATION | one_step)
    keys = {key for line in open(tmp_path / "metrics.jsonl") for key in json.loads(line)}
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    fields = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert "validation_loss" in keys and keys <= set(re.findall(r"`(\w+)`", " ".join(fields)))


class TimedTrainer(Trainer):
    """Looks at the timeouts while it saves."""

    def _progress(self):
        self.while_saving = timeouts(self)
        return super()._progress()


def timeouts(trainer):
    """Seconds that the backend and the watchdog wait for a rank."""
    backend = dist.group.WORLD._get_backend(CPU)
    return backend.options._timeout.total_seconds(), trainer.watchdog._timeout


def timeouts_of_a_run(settings):
    trainer = build(settings, TimedTrainer)
    trainer.run()
    return trainer.while_saving, timeouts(trainer)


def test_a_save_may_take_longer_than_a_step(tmp_path):
    settings = COMMON | {
        "job.dump_folder": tmp_path,
        "checkpoint.enable": True,
        "training.steps": 2,
        "comm.init_timeout_seconds": 200,
        "comm.train_timeout_seconds": 50,
    }
    [(while_saving, afterwards)] = run_ranks(timeouts_of_a_run, 1, settings)
    grace = BACKEND_GRACE_SECONDS
    assert (while_saving, afterwards) == ((200 + grace, 200), (50 + grace, 50))


def phases(settings):
    """What the watchdog is told, in order."""
    trainer = build(settings, Trainer)
    told = []
    trainer.watchdog.mark = lambda step, phase: told.append(phase)
    trainer.run()
    return told


def test_the_watchdog_hears_of_every_validation_batch(tmp_path):
    """A phase has a timeout, and a long validation is not one phase."""
    steps = {"training.steps": 1, "validation.steps": 5}
    settings = COMMON | VALIDATION | steps | {"job.dump_folder": tmp_path}
    [told] = run_ranks(phases, 1, settings)
    assert told.count("validation") == 1 + 5


def by_step(folder):
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record for record in lines if "validation_loss" in record}


def test_a_run_ends_where_its_data_ends_and_saves(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "some words " * n}) + "\n" for n in range(1, 40)))
    settings = CHECKPOINTS | {
        "training.dataset": data,
        "training.no_repeat": True,
        "training.steps": 100,
        "checkpoint.interval": 50,
    }
    *_, hashes = run(tmp_path / "one", **settings)
    *_, ours = run(tmp_path / "two", 2, **settings)
    assert hashes == ours and 1 < len(hashes) < 100
    saved = [path.name for path in (tmp_path / "two" / "checkpoint").iterdir()]
    assert saved == [f"step-{len(hashes)}"]


def messages(settings):
    """What a rank logs."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    build(settings, Trainer).run()
    return told


def test_lines_that_cannot_be_used_are_named_and_counted(tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": "some words " * n}) for n in range(1, 40)]
    data.write_text("\n".join([*lines, "not JSON", "[]"]))
    settings = COMMON | {"job.dump_folder": tmp_path, "training.dataset": data}
    [told] = run_ranks(messages, 1, settings | {"training.no_repeat": True, "training.steps": 100})
    assert sum(f"document skipped: {data}:4" in line for line in told) == 2  # lines 40 and 41
    assert told[-1] == "2 documents of this rank's data could not be used"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("n_layers", 1, "no place for layers.1.attention.wk.weight"),
        ("n_layers", 3, "lacks layers.2.attention.wk.weight"),
        ("ffn_dim", 64, r"another shape.*layers.0.feed_forward.w1.weight \[48, 32\] in place of \[64, 32\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_the_start(checkpointed, key, value, words):
    settings = COMMON | {
        "job.dump_folder": checkpointed,
        "checkpoint.enable": True,
        f"model.overrides.{key}": value,
    }
    argv = [f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items()]
    with pytest.raises(ConfigError, match=words):
        prepare(load_config(argv), 1, CPU)


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpointed")
    settings = {"training.steps": 2, "checkpoint.enable": True, "checkpoint.no_last_save_model_only": True}
    run(folder, **settings | {"training.local_batch_size": 12})
    return folder
