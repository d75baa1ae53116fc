"""What the oracle tries: a config's layout cut down to this machine, and one process beside it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace

import torch

from torchtitan.config.faults import ConfigError
from torchtitan.config.nested import value_at, with_value
from torchtitan.config.pipeline import PipelinePlan
from torchtitan.config.pipeline_faults import pipeline_faults
from torchtitan.config.schema import JobConfig, Optimizer, Parallelism, Training
from torchtitan.config.sequence_cuts import length_unit
from torchtitan.config.without_gpus import without_gpus
from torchtitan.data.batch import Batch
from torchtitan.models.decoder import DecoderConfig
from torchtitan.preflight import checked_model
from torchtitan.quantization.converters import emulated, exact
from torchtitan.verify_data import global_batches

MAX_RANKS = 8
MAX_SEQ_LEN = 32
MAX_MICROBATCHES = 2
NARROWEST = 4
"""Heads of a model in low precision: most of its layers then have widths that this takes."""
ON_CPU = "aot_eager_decomp_partition"
"""The compiler's backend: inductor's operators and its partition into forward and backward."""


@dataclass(frozen=True)
class Case:
    """One layout to try, all of it settled."""

    config: JobConfig
    model_config: DecoderConfig
    batches: tuple[Batch, ...]
    """The global batch of each step."""
    world_size: int
    settled: tuple[str, ...]
    """What was changed of the user's config, in words."""


def settle(config: JobConfig, full: bool) -> Case:
    """The case that a training config describes; `full` keeps the model's size and lengths.

    Raises ConfigError with every fault of the config as it stands.
    """
    model, faults = checked_model(config)
    if faults:
        raise ConfigError(faults)

    notes: list[str] = []
    notes += _changes("", config, emulated(config), ())
    config = emulated(config)
    parallelism, world_size = _ranks(config.parallelism, notes)
    parallelism = without_gpus(parallelism, notes)
    tp, cp = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
    if not full:
        by_head = parallelism.context_parallel_method == "heads"
        heads = tp * cp if by_head else tp
        small = model.shrunk(heads if exact(config) == config else NARROWEST * heads)
        if parallelism.pipeline_parallel_degree > 1:
            parallelism, small = _few_layers(config, model, parallelism, small)
        notes += _changes("model.", model, small, ("seq_len",))
        model = small
        config = _fitting_filters(config, model, notes)
    dp = world_size // (tp * cp * parallelism.pipeline_parallel_degree)
    plan = PipelinePlan(replace(config, parallelism=parallelism), model.n_layers)
    training = _batch(config, plan, dp, full, notes)
    new = replace(
        config,
        parallelism=parallelism,
        training=training,
        optimizer=_in_full_precision(config.optimizer, notes),
        compile=_on_cpu(config, notes),
        debug=replace(config.debug, seed=config.debug.seed or 0),
    )
    model = replace(model, seq_len=training.seq_len)
    if model.attn_type != "sdpa":
        notes.append(f"attention: {model.attn_type} -> SDPA with the same mask, as on every CPU")
    if faults := list(pipeline_faults(new, model.n_layers)):
        raise ConfigError(faults)  # its stages do not fit the ranks that are left
    batches = global_batches(new, model.vocab_size, notes)
    return Case(new, model, batches, world_size, tuple(notes))


def alone(case: Case) -> Case:
    """The same global batch on one process: no mesh, no recomputation, no compiler."""
    config = case.config
    changes = {
        "parallelism": Parallelism(),
        "training.local_batch_size": config.training.global_batch_size,
        "training.enable_cpu_offload": False,
        "compile.enable": False,
        "activation_checkpoint.mode": "none",
        "quantize.grouped_mm.float8.exchange_in_float8": False,
    }
    if config.parallelism.tensor_parallel_degree > 1:  # it leaves the head in high precision
        filters = config.quantize.linear.float8.filter_fqns
        changes["quantize.linear.float8.filter_fqns"] = [*filters, "output"]
    for key, value in changes.items():
        config = with_value(config, key, value)
    return replace(case, config=config, world_size=1)


def _fitting_filters(config: JobConfig, model: DecoderConfig, notes: list[str]) -> JobConfig:
    """Without filters of Linear layers that a small model has not, or that go by the size of layers."""
    if not config.model.converters:
        return config
    with torch.device("meta"):
        names = [name for name, _ in model.build().named_modules()]
    new = config
    for key in ("quantize.linear.float8.filter_fqns", "quantize.linear.mx.filter_fqns"):
        parts = [part for part in value_at(config, key) if any(part in name for name in names)]
        new = with_value(new, key, parts)
    notes += _changes("", config, new, ())
    return new


def without_rounding(case: Case) -> Case:
    """The same case in the precision of its weights; itself where that is its own."""
    return replace(case, config=exact(case.config))


def _ranks(parallelism: Parallelism, notes: list[str]) -> tuple[Parallelism, int]:
    """Degrees whose product is at most MAX_RANKS; an axis that was used stays used."""
    wanted = {
        "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
        "data_parallel_shard_degree": parallelism.data_parallel_shard_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
        "expert_parallel_degree": parallelism.expert_parallel_degree,
        "expert_tensor_parallel_degree": parallelism.expert_tensor_parallel_degree,
    }
    replicate, shard, cp, tp, pp, ep, etp = wanted.values()
    open_ended = shard == -1
    if open_ended:
        shard = 2
    if replicate * shard * cp * tp * pp > MAX_RANKS:
        replicate = _smallest_divisor(replicate)
    if replicate * shard * cp * tp * pp > MAX_RANKS:
        shard = _smallest_divisor(shard)
    if replicate * shard * cp * tp * pp > MAX_RANKS:
        cp = _smallest_divisor(cp)
    if replicate * shard * cp * tp * pp > MAX_RANKS:
        tp = _smallest_divisor(tp)
    if replicate * shard * cp * tp * pp > MAX_RANKS and not parallelism.pipeline_parallel_schedule_csv:
        pp = _smallest_divisor(pp)
    if replicate * shard * cp * tp * pp > MAX_RANKS:
        shard = 1  # context-parallel ranks shard parameters too
    split = 1 if etp == 1 or ep == 1 else tp
    if open_ended:
        most = MAX_RANKS // (replicate * cp * tp * pp)
        legal = [n for n in range(2, most + 1) if n * cp * tp // split % ep == 0]
        shard = legal[0] if legal else shard
    ep = math.gcd(ep, shard * cp * tp // split)
    degrees = (replicate, shard, cp, tp, pp, ep, etp if ep == 1 else split)
    settled = dict(zip(wanted, degrees, strict=True))
    notes += [
        f"parallelism.{axis}: {wanted[axis]} -> {settled[axis]}"
        for axis in wanted
        if wanted[axis] != settled[axis]
    ]
    return replace(parallelism, **settled), replicate * shard * cp * tp * pp


def _smallest_divisor(degree: int) -> int:
    """Above one, where there is one."""
    return next((n for n in range(2, degree + 1) if degree % n == 0), 1)


def _few_layers(
    config: JobConfig, model: DecoderConfig, parallelism: Parallelism, small: DecoderConfig
) -> tuple[Parallelism, DecoderConfig]:
    """As many stages a rank as the config has, of a layer each, and one layer more where that fits."""
    plan = PipelinePlan(config, model.n_layers)
    stages = plan.num_stages // plan.num_ranks * parallelism.pipeline_parallel_degree
    new = replace(
        parallelism,
        module_fqns_per_model_part=None,
        pipeline_parallel_layers_per_stage=None,
        pipeline_parallel_first_stage_less_layers=0,
        pipeline_parallel_last_stage_less_layers=0,
        pipeline_parallel_microbatch_size=min(parallelism.pipeline_parallel_microbatch_size, 2),
    )
    small = replace(small, n_layers=stages + 1)
    if PipelinePlan(replace(config, parallelism=new), small.n_layers).num_stages != stages:
        new = replace(new, pipeline_parallel_layers_per_stage=1)
        small = replace(small, n_layers=stages)
    return new, small


def _local_batch(config: JobConfig, case: PipelinePlan) -> int:
    """Two sequences; in a pipeline as many microbatches as the config has, or some more than stages."""
    if case.num_ranks == 1:
        return min(config.training.local_batch_size, 2)
    size = config.parallelism.pipeline_parallel_microbatch_size
    count, stages = config.training.local_batch_size // size, case.num_stages
    counts = range(min(count, stages + 1), count + 3 * stages)
    legal = (n for n in counts if case.schedule.takes(n, case.num_ranks, stages))
    return next(legal) * case.parallelism.pipeline_parallel_microbatch_size


def _batch(
    config: JobConfig, case: PipelinePlan, dp: int, full: bool, notes: list[str]
) -> Training:
    """Training settings of the case: two sequences a microbatch, at most two microbatches."""
    training, parallelism = config.training, case.parallelism
    microbatches = 1
    if training.global_batch_size > training.local_batch_size:
        microbatches = MAX_MICROBATCHES
    local = _local_batch(config, case)
    seq_len = training.seq_len if full else min(training.seq_len, MAX_SEQ_LEN)
    seq_len -= seq_len % length_unit(parallelism)
    new = replace(
        training,
        local_batch_size=local,
        global_batch_size=local * dp * microbatches,
        seq_len=seq_len,
        dtype="float32",
        mixed_precision_param="float32",
    )
    notes += _changes("training.", training, new, ())
    return new


def _in_full_precision(optimizer: Optimizer, notes: list[str]) -> Optimizer:
    """What the blocks of quantized moments are hangs on the layout, and so do rounding's draws."""
    name = "AdamW" if optimizer.name == "AdamW8bit" else optimizer.name
    new = replace(optimizer, name=name, bf16_stochastic_round=False)
    notes += _changes("optimizer.", optimizer, new, ())
    return new


def _on_cpu(config: JobConfig, notes: list[str]):
    """The compiler without its code generator: graphs, hooks and what is recomputed are the same."""
    if not config.compile.enable or config.compile.backend == ON_CPU:
        return config.compile
    if exact(config) != config:
        notes.append("compile.enable: True -> False, for emulated products are not compiled")
        return replace(config.compile, enable=False)
    notes.append(f"compile.backend: {config.compile.backend} -> {ON_CPU}")
    return replace(config.compile, backend=ON_CPU)


def _changes(prefix: str, old: object, new: object, hidden: tuple[str, ...]) -> Iterator[str]:
    for key, value in vars(new).items():
        before = getattr(old, key)
        if value == before or key in hidden:
            continue
        if is_dataclass(value) and is_dataclass(before):
            yield from _changes(f"{prefix}{key}.", before, value, hidden)
        else:
            yield f"{prefix}{key}: {before} -> {value}"
