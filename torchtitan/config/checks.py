"""Can the values of a config work, alone and together? One named rule an invariant.

Tables of bounds and names are in bounds.py, rules that need the number of ranks in distributed/mesh.py,
those of a model's shape in models/decoder.py (`update_from_config`), those of sources and tokenizers in data.
"""

import json
from collections.abc import Callable, Iterator

from torchtitan.config import bounds
from torchtitan.config.batch_size import global_batch_size
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.not_built import refusals
from torchtitan.config.optimizer_faults import optimizer_faults
from torchtitan.config.schema import Checkpoint, JobConfig


def check_config(config: JobConfig) -> list[Fault]:
    """Everything about the config that cannot work on any number of ranks, or is not built."""
    return [fault for rule in RULES for fault in rule(config)]


def max_norm_is_positive(config: JobConfig) -> Iterator[Fault]:
    max_norm = config.training.max_norm
    if not max_norm > 0:
        reason = "would scale every gradient to nothing."
        yield Fault("training.max_norm", reason, "Use inf for no clipping.", max_norm)


def tokenizer_is_a_folder(config: JobConfig) -> Iterator[Fault]:
    path = config.model.hf_assets_path
    if path.endswith("tokenizer.model"):
        reason = "files of tiktoken and SentencePiece are not read."
        remedy = "Give the folder that has tokenizer.json."
        yield Fault("model.hf_assets_path", reason, remedy, path)


def global_batch_holds_whole_microbatches(config: JobConfig) -> Iterator[Fault]:
    training, parallelism = config.training, config.parallelism
    # A shard degree of -1 depends on the number of ranks: preflight asks again when it is known.
    ranks = parallelism.data_parallel_replicate_degree
    ranks *= max(1, parallelism.data_parallel_shard_degree)
    if min(training.global_batch_size, training.local_batch_size, ranks) < 1:
        return
    try:
        global_batch_size(training, ranks)
    except ConfigError as error:
        yield from error.faults


def workers_have_their_settings(config: JobConfig) -> Iterator[Fault]:
    for section in ("training", "validation"):
        loader = getattr(config, section).dataloader
        if loader.num_workers > 0:
            continue
        reason = f"needs workers, and {section}.dataloader.num_workers is 0."
        if loader.persistent_workers:
            yield Fault(f"{section}.dataloader.persistent_workers", reason, value=True)
        if loader.prefetch_factor is not None:
            key = f"{section}.dataloader.prefetch_factor"
            yield Fault(key, reason, value=loader.prefetch_factor)


def selective_ac_option_is_op_or_a_number(config: JobConfig) -> Iterator[Fault]:
    option = config.activation_checkpoint.selective_ac_option
    if option != "op" and not (option.isascii() and option.isdigit() and int(option) > 0):
        reason = 'must be "op", or every how many layers one is recomputed, as "2".'
        yield Fault("activation_checkpoint.selective_ac_option", reason, value=option)


def memory_budget_needs_a_compiled_model(config: JobConfig) -> Iterator[Fault]:
    compiled = config.compile.enable and "model" in config.compile.components
    if config.activation_checkpoint.mode == "memory_budget" and not compiled:
        reason = "is a choice of the compiler, and the model is not compiled."
        remedy = 'Set compile.enable = true with "model" in compile.components.'
        yield Fault("activation_checkpoint.mode", reason, remedy, "memory_budget")


def profiler_fits_its_cycle(config: JobConfig) -> Iterator[Fault]:
    profiling = config.profiling
    needed = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < needed:
        reason = f"is less than profiler_warmup + profiler_active = {needed}."
        yield Fault("profiling.profile_freq", reason, value=profiling.profile_freq)


_NOT_ENABLED = "no checkpoint is loaded or saved."
_ENABLE = "Set checkpoint.enable = true."


def more_than_one_checkpoint_is_kept(config: JobConfig) -> Iterator[Fault]:
    if config.checkpoint.keep_latest_k == 1:
        reason = "the only checkpoint would be the one being written."
        yield Fault("checkpoint.keep_latest_k", reason, "Use 2 or more, or 0 for all.", 1)


def hugging_face_checkpoints_hold_the_model_only(config: JobConfig) -> Iterator[Fault]:
    checkpoint = config.checkpoint
    reason = "Hugging Face files hold weights alone"
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        remedy = "Set checkpoint.initial_load_model_only = true."
        yield Fault("checkpoint.initial_load_in_hf", f"{reason}.", remedy, True)
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        remedy = "Set checkpoint.last_save_model_only = true."
        yield Fault("checkpoint.last_save_in_hf", f"{reason}.", remedy, True)
    if checkpoint.initial_load_in_hf_quantized and not checkpoint.initial_load_in_hf:
        remedy = "Set checkpoint.initial_load_in_hf = true."
        key = "checkpoint.initial_load_in_hf_quantized"
        yield Fault(key, "says how Hugging Face files are read, and none are.", remedy, True)
    for key in ("initial_load_in_hf", "last_save_in_hf"):
        if getattr(checkpoint, key) and not checkpoint.enable:
            yield Fault(f"checkpoint.{key}", _NOT_ENABLED, _ENABLE, True)
    if checkpoint.last_save_in_hf and checkpoint.load_only:
        remedy = "Set checkpoint.load_only = false."
        yield Fault("checkpoint.last_save_in_hf", "nothing is saved.", remedy, True)


def loading_needs_checkpoints(config: JobConfig) -> Iterator[Fault]:
    checkpoint, defaults = config.checkpoint, Checkpoint()
    for key in ("initial_load_path", "load_step"):
        value = getattr(checkpoint, key)
        if value != getattr(defaults, key) and not checkpoint.enable:
            yield Fault(f"checkpoint.{key}", _NOT_ENABLED, _ENABLE, value)


def seed_checkpoint_needs_checkpoints(config: JobConfig) -> Iterator[Fault]:
    checkpoint = config.checkpoint
    if checkpoint.create_seed_checkpoint and (checkpoint.load_only or not checkpoint.enable):
        remedy = "Set checkpoint.enable = true and checkpoint.load_only = false."
        yield Fault("checkpoint.create_seed_checkpoint", "nothing is saved.", remedy, True)


def wall_time_needs_checkpoints(config: JobConfig) -> Iterator[Fault]:
    checkpoint = config.checkpoint
    if checkpoint.max_run_seconds is None or (checkpoint.enable and not checkpoint.load_only):
        return
    reason = "would end the run with nothing saved."
    remedy = "Set checkpoint.enable = true and checkpoint.load_only = false."
    yield Fault("checkpoint.max_run_seconds", reason, remedy, checkpoint.max_run_seconds)


def experts_are_split_by_tensor_degree(config: JobConfig) -> Iterator[Fault]:
    parallelism = config.parallelism
    etp, tp = parallelism.expert_tensor_parallel_degree, parallelism.tensor_parallel_degree
    if parallelism.expert_parallel_degree > 1 and etp not in (1, tp):
        reason = f"must be 1 or parallelism.tensor_parallel_degree = {tp}."
        yield Fault("parallelism.expert_tensor_parallel_degree", reason, value=etp)


def async_tensor_parallel_overlaps_compiled_exchanges(config: JobConfig) -> Iterator[Fault]:
    setting, parallelism = "parallelism.enable_async_tensor_parallel", config.parallelism
    if not parallelism.enable_async_tensor_parallel:
        return
    if not (config.compile.enable and "model" in config.compile.components):
        reason = "is done by the compiler, and the model is not compiled."
        remedy = "Set compile.enable = true, with model in compile.components."
        yield Fault(setting, reason, remedy, True)
    if not parallelism.enable_sequence_parallel:
        reason = "overlaps the exchanges of sequence parallelism, which is off."
        yield Fault(setting, reason, "Set parallelism.enable_sequence_parallel = true.", True)


def keys_are_exchanged_where_a_way_is_chosen(config: JobConfig) -> Iterator[Fault]:
    parallelism = config.parallelism
    if parallelism.context_parallel_method == "heads":
        if parallelism.context_parallel_rotate_method != "allgather":
            reason = 'is a way to exchange keys and values; context_parallel_method = "heads" does not.'
            key, value = "rotate_method", parallelism.context_parallel_rotate_method
            yield Fault(f"parallelism.context_parallel_{key}", reason, 'Use "allgather".', value)


def pipeline_splits_the_batch_evenly(config: JobConfig) -> Iterator[Fault]:
    parallelism, local = config.parallelism, config.training.local_batch_size
    size = parallelism.pipeline_parallel_microbatch_size
    if parallelism.pipeline_parallel_degree > 1 and size > 0 and local % size:
        reason = f"does not divide training.local_batch_size = {local}."
        yield Fault("parallelism.pipeline_parallel_microbatch_size", reason, value=size)


def float8_options_fit_together(config: JobConfig) -> Iterator[Fault]:
    prefix, options = "quantize.linear.float8", config.quantize.linear.float8
    if not {"float8", prefix} & set(config.model.converters):
        return
    if options.emulate and config.compile.enable:
        reason = "cannot be combined with compile.enable."
        yield Fault(f"{prefix}.emulate", reason, value=True)
    if options.enable_fsdp_float8_all_gather and options.recipe_name not in (None, "tensorwise"):
        reason = f'needs one scale a weight, and recipe_name = "{options.recipe_name}" has one a row.'
        remedy = 'Set it to false, or recipe_name = "tensorwise".'
        yield Fault(f"{prefix}.enable_fsdp_float8_all_gather", reason, remedy, True)
    if options.enable_fsdp_float8_all_gather and config.training.enable_cpu_offload:
        reason = "weights that live on the CPU are not gathered as float8."
        yield Fault(f"{prefix}.enable_fsdp_float8_all_gather", reason, "Set one of them to false.", True)
    if options.precompute_float8_dynamic_scale_for_fsdp and not options.enable_fsdp_float8_all_gather:
        reason = "computes the scales of weights that are gathered as float8, and none are."
        remedy = f"Set {prefix}.enable_fsdp_float8_all_gather = true."
        yield Fault(f"{prefix}.precompute_float8_dynamic_scale_for_fsdp", reason, remedy, True)
    if "auto_filter_small_kn" in options.filter_fqns and options.recipe_name == "rowwise_with_gw_hp":
        reason = "torchao knows which sizes gain by tensorwise and rowwise alone."
        yield Fault(f"{prefix}.filter_fqns", reason, value="auto_filter_small_kn")


def warnings_need_determinism(config: JobConfig) -> Iterator[Fault]:
    if config.debug.deterministic_warn_only and not config.debug.deterministic:
        reason = "has no effect without debug.deterministic."
        yield Fault("debug.deterministic_warn_only", reason, value=True)


def batch_invariance_is_possible(config: JobConfig) -> Iterator[Fault]:
    if not config.debug.batch_invariant:
        return
    parallelism, sums = config.parallelism, "sums over ranks depend on where a row lies in the message"
    asked = {
        "compile.enable": (config.compile.enable, False, "compiled products are chosen by shape"),
        "model.converters": (config.model.converters, [], "quantized products are chosen by shape"),
        "debug.moe_force_load_balance": (
            config.debug.moe_force_load_balance,
            False,
            "a token's turn depends on its place",
        ),
        "parallelism.tensor_parallel_degree": (parallelism.tensor_parallel_degree, 1, sums),
        "parallelism.context_parallel_degree": (
            parallelism.context_parallel_degree,
            1,
            "attention is computed for whole documents",
        ),
        "parallelism.expert_parallel_comm_backend": (
            parallelism.expert_parallel_comm_backend,
            "standard",
            "only the standard exchange is held to it",
        ),
    }
    for key, (value, needed, why) in asked.items():
        if value != needed:
            reason = f"does not go with debug.batch_invariant: {why}."
            yield Fault(key, reason, f"Use {json.dumps(needed)}.", value)


RULES: tuple[Callable[[JobConfig], Iterator[Fault]], ...] = (
    bounds.counts_are_large_enough,
    bounds.counts_of_all_are_positive_or_minus_one,
    bounds.fractions_are_between_0_and_1,
    bounds.names_are_not_empty,
    bounds.names_are_known,
    optimizer_faults,
    max_norm_is_positive,
    tokenizer_is_a_folder,
    global_batch_holds_whole_microbatches,
    workers_have_their_settings,
    selective_ac_option_is_op_or_a_number,
    memory_budget_needs_a_compiled_model,
    profiler_fits_its_cycle,
    more_than_one_checkpoint_is_kept,
    hugging_face_checkpoints_hold_the_model_only,
    loading_needs_checkpoints,
    seed_checkpoint_needs_checkpoints,
    wall_time_needs_checkpoints,
    experts_are_split_by_tensor_degree,
    async_tensor_parallel_overlaps_compiled_exchanges,
    keys_are_exchanged_where_a_way_is_chosen,
    pipeline_splits_the_batch_evenly,
    float8_options_fit_together,
    warnings_need_determinism,
    batch_invariance_is_possible,
    refusals,
)
