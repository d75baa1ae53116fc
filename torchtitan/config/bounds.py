"""Which values can a key have by itself? Bounds of numbers, and names that are known.

A table a rule, of the keys that it is for; checks.py has the rules that are for one key, or for several.
"""

from collections.abc import Iterator

from torchtitan.config.faults import Fault
from torchtitan.config.names import leaf_keys, unknown_value
from torchtitan.config.schema import JobConfig

LEAST = {
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.load_step": -1,
    "checkpoint.max_run_seconds": 1,
    "comm.init_timeout_seconds": 1,
    "comm.trace_buf_size": 0,
    "comm.train_timeout_seconds": 1,
    "debug.seed": 0,
    "lr_scheduler.total_steps": 1,
    "lr_scheduler.warmup_steps": 0,
    "metrics.log_freq": 1,
    "moe.global_balance_coeff": 0,
    "moe.max_rows_per_chunk": 0,
    "moe.router_z_coeff": 0,
    "moe.sequence_balance_coeff": 0,
    "optimizer.eps": 0,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "parallelism.context_parallel_degree": 1,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.expert_parallel_degree": 1,
    "parallelism.expert_tensor_parallel_degree": 1,
    "parallelism.pipeline_parallel_degree": 1,
    "parallelism.pipeline_parallel_first_stage_less_layers": 0,
    "parallelism.pipeline_parallel_last_stage_less_layers": 0,
    "parallelism.pipeline_parallel_layers_per_stage": 1,
    "parallelism.pipeline_parallel_microbatch_size": 1,
    "parallelism.symmetric_memory_capacity_factor": 1,
    "parallelism.tensor_parallel_degree": 1,
    "profiling.profile_freq": 1,
    "profiling.profiler_active": 1,
    "profiling.profiler_warmup": 0,
    "training.dataloader.num_workers": 0,
    "training.dataloader.prefetch_factor": 1,
    "training.gc_freq": 1,
    "training.local_batch_size": 1,
    "training.max_skipped_steps": 1,
    "training.seq_len": 1,
    "training.steps": 1,
    "validation.dataloader.num_workers": 0,
    "validation.dataloader.prefetch_factor": 1,
    "validation.freq": 1,
    "validation.local_batch_size": 1,
    "validation.seq_len": 1,
}
"""The least value of keys that count something."""

AT_LEAST_ONE_OR_ALL = (
    "parallelism.data_parallel_shard_degree",
    "training.global_batch_size",
    "validation.steps",
)
"""Keys that are 1 or more, or -1 for all there is."""

FRACTIONS = (
    "activation_checkpoint.memory_budget",
    "lr_scheduler.decay_ratio",
    "lr_scheduler.min_lr_factor",
)
"""Keys from 0 to 1."""

NOT_EMPTY = (
    "checkpoint.folder",
    "job.dump_folder",
    "training.dataset",
    "training.dataset_path",
    "validation.dataset",
    "validation.dataset_path",
)
"""Keys of which an empty one, as an unset "$DATA" gives it, would be the folder a run starts in."""

CHOICES = {
    "activation_checkpoint.determinism_check": ("default", "none"),
    "compile.components": ("model", "loss"),
    "checkpoint.exclude_from_loading": ("optimizer", "lr_scheduler", "dataloader", "train_state"),
    "fault_tolerance.process_group": ("gloo", "nccl"),
    "fault_tolerance.semi_sync_method": ("local_sgd", "diloco"),
    "optimizer.name": ("Adam", "AdamW", "AdamW8bit", "Muon"),
    "parallelism.context_parallel_load_balancer": ("headtail", "ptrr"),
}
"""Keys, or lists of them, whose values upstream left open and that know only these."""


def is_positive_count(key: str) -> bool:
    """Whether other rules may divide by a key's value, or make as many of something."""
    return LEAST.get(key, 0) >= 1 or key in AT_LEAST_ONE_OR_ALL


def counts_are_large_enough(config: JobConfig) -> Iterator[Fault]:
    values = leaf_keys(config)
    for key, least in LEAST.items():
        value = values[key]
        if value is not None and not value >= least:
            yield Fault(key, f"must be at least {least}.", value=value)


def counts_of_all_are_positive_or_minus_one(config: JobConfig) -> Iterator[Fault]:
    values = leaf_keys(config)
    for key in AT_LEAST_ONE_OR_ALL:
        if values[key] < 1 and values[key] != -1:
            yield Fault(key, "must be at least 1, or -1.", value=values[key])


def fractions_are_between_0_and_1(config: JobConfig) -> Iterator[Fault]:
    values = leaf_keys(config)
    for key in FRACTIONS:
        if values[key] is not None and not 0 <= values[key] <= 1:
            yield Fault(key, "must be from 0 to 1.", value=values[key])


def names_are_not_empty(config: JobConfig) -> Iterator[Fault]:
    values = leaf_keys(config)
    for key in NOT_EMPTY:
        if values[key] == "":
            yield Fault(key, "is empty.", "Give a name, or leave the key out.", "")


def names_are_known(config: JobConfig) -> Iterator[Fault]:
    values = leaf_keys(config)
    for key, choices in CHOICES.items():
        given = values[key] if isinstance(values[key], list) else [values[key]]
        for name in given:
            if name is not None and name not in choices:
                yield unknown_value(key, name, choices)
