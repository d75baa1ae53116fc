"""Which runs must work from end to end, by suite: one entry each, its losses those of one process.

`features` are layouts and options of one model, `models` are all families on several layouts.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OverrideDefinitions:
    """One case: runs one after the other in the same dump folder, each with its arguments."""

    override_args: tuple[tuple[str, ...], ...]
    test_descr: str
    test_name: str
    ngpu: int = 1
    """Ranks on each machine."""
    nnodes: int = 1
    """Launchers that meet on this host, as they would on several machines."""
    model: str = "llama3"
    """Whose one process draws the curve to follow; see MODELS."""
    launched: bool = False
    """Through run_train.sh; other cases enter the same main in ranks that are forked."""
    tolerance: float = 1e-6
    """How far its losses may be from that curve, relatively."""


FLOAT8 = ("--model.converters=quantize.linear.float8", "--quantize.linear.float8.emulate")
ROWWISE = "--quantize.linear.float8.recipe_name=rowwise"
MODELS: dict[str, tuple[str, ...]] = {
    "llama3": (),
    "llama3_rowwise": (*FLOAT8, ROWWISE, "--quantize.linear.float8.filter_fqns=output"),
    "llama3_rowwise_head": (*FLOAT8, ROWWISE),
    "llama3_tensorwise": FLOAT8,
    "llama3_tied": ("--model.overrides.enable_weight_tying=true",),
    "llama3_packed": ("--model.overrides.attn_mask_type=block_causal",),
    "llama3_muon": ("--optimizer.name=Muon",),
    "llama3_8bit": ("--optimizer.name=AdamW8bit", "--optimizer.implementation=for-loop"),
    "qwen3": ("--model.name=qwen3",),
    "qwen3_moe": ("--model.name=qwen3", "--model.flavor=debugmodel_moe"),
    "qwen3_moe_float8": (
        "--model.name=qwen3",
        "--model.flavor=debugmodel_moe",
        "--model.converters=quantize.grouped_mm.float8",
        "--quantize.grouped_mm.float8.fqns=experts",
        "--quantize.grouped_mm.float8.emulate",
    ),
    "qwen3_moe_muon": ("--model.name=qwen3", "--model.flavor=debugmodel_moe", "--optimizer.name=Muon"),
    "deepseek_v3": ("--model.name=deepseek_v3",),
    "deepseek_v3_packed": ("--model.name=deepseek_v3", "--model.flavor=debugmodel_flex_attn"),
    "gpt_oss": ("--model.name=gpt_oss", "--model.overrides.sliding_window=16"),
    "mixtral": ("--model.name=mixtral",),
    "olmo2": ("--model.name=olmo2",),
    "llama4": (
        "--model.name=llama4",
        "--model.flavor=debugmodel_irope",
        "--model.overrides.n_layers=4",
        "--model.overrides.attention_chunk=24",
    ),
}
"""What makes each model from tiny.toml's."""

SHARD = "--parallelism.data_parallel_shard_degree"
REPLICATE = "--parallelism.data_parallel_replicate_degree"
TENSOR = "--parallelism.tensor_parallel_degree"
CONTEXT = "--parallelism.context_parallel_degree"
PIPELINE = "--parallelism.pipeline_parallel_degree"
EXPERT = "--parallelism.expert_parallel_degree"
EXPERT_TENSOR = "--parallelism.expert_tensor_parallel_degree"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"
BATCH = "--training.local_batch_size"
NO_SP = "--parallelism.no_enable_sequence_parallel"
AC = "--activation_checkpoint.mode"
BY_OP = (f"{AC}=selective", "--activation_checkpoint.selective_ac_option=op")
COMPILE = ("--compile.enable", "--compile.backend=aot_eager")
CHECKPOINT = ("--checkpoint.enable", "--checkpoint.no_last_save_model_only")
HALF = (*CHECKPOINT, "--training.steps=2")


def _case(name: str, description: str, ngpu: int, *args: str, **more) -> OverrideDefinitions:
    """A case of one run."""
    return OverrideDefinitions((args,), description, name, ngpu, **more)


def _resumed(
    name: str, description: str, ngpu: int, first: Iterable[str], second: Iterable[str], **more
) -> OverrideDefinitions:
    """A case of two runs: two steps, and then the rest from their checkpoint."""
    runs = ((*HALF, *first), (*CHECKPOINT, *second))
    return OverrideDefinitions(runs, description, name, ngpu, **more)


_DATA = (
    _case("one_process", "one process", 1, launched=True),
    _case("fsdp_2", "FSDP", 2, f"{BATCH}=6", launched=True),
    _case(
        "fsdp_3",
        "FSDP over ranks that divide no weight evenly, weights kept after forward",
        3,
        f"{BATCH}=4",
        "--parallelism.fsdp_reshard_after_forward=never",
    ),
    _case("fsdp_4_reshard", "weights freed after forward", 4, f"{BATCH}=3",
          "--parallelism.fsdp_reshard_after_forward=always"),
    _case("hsdp_2x2", "HSDP: two replicas of two shards", 4, f"{BATCH}=3", f"{REPLICATE}=2", f"{SHARD}=2"),
    _case("replicate_2", "two replicas", 2, f"{BATCH}=6", f"{REPLICATE}=2", f"{SHARD}=1"),
    _case("accumulation", "gradient accumulation over three microbatches", 2, f"{BATCH}=2"),
    _case("accumulation_reduce_each", "gradients reduced after each microbatch", 2, f"{BATCH}=2",
          "--training.sync_gradients_each_microbatch"),
    _case("cpu_offload", "weights and optimizer state in host memory", 2, f"{BATCH}=6",
          "--training.enable_cpu_offload"),
    _case("workers", "documents read by two worker processes", 1, "--training.dataloader.num_workers=2"),
    _case("two_nodes", "two launchers of two ranks each, as on two machines", 2, f"{BATCH}=3",
          nnodes=2, launched=True),
    _case("foreach", "the optimizer's foreach implementation", 2, f"{BATCH}=6",
          "--optimizer.implementation=foreach"),
    _case(
        "validation",
        "validation beside training",
        2,
        f"{BATCH}=6",
        "--validation.enable",
        "--validation.dataset=c4_test_validation",
        "--validation.local_batch_size=2",
        "--validation.seq_len=64",
        "--validation.steps=2",
        "--validation.freq=2",
    ),
)  # fmt: skip

_RECOMPUTATION = (
    _case("ac_full", "full activation checkpointing", 1, f"{AC}=full"),
    _case("ac_every_second", "every second layer recomputed", 2, f"{BATCH}=6", f"{AC}=selective",
          "--activation_checkpoint.selective_ac_option=2"),
    _case("ac_by_op", "activation checkpointing by operation", 2, f"{BATCH}=6", *BY_OP),
    _case("compile", "compiled blocks and loss", 2, f"{BATCH}=6", *COMPILE),
    _case("compile_ac_by_op", "compiled blocks, recomputed by operation", 1, *COMPILE, *BY_OP),
)  # fmt: skip

_TENSOR = (
    _case("tp_2", "tensor parallelism", 2, f"{TENSOR}=2", launched=True),
    _case("tp_4", "tensor parallelism over four ranks", 4, f"{TENSOR}=4"),
    _case("tp_2_no_sp", "without sequence parallelism", 2, f"{TENSOR}=2", NO_SP),
    _case("tp_2_whole_logits", "all logits on every rank", 2, f"{TENSOR}=2",
          "--parallelism.disable_loss_parallel"),
    _case("tp_2_fsdp_2", "with FSDP", 4, f"{TENSOR}=2", f"{BATCH}=6"),
    _case("tp_2_hsdp_2x2", "with HSDP", 8, f"{TENSOR}=2", f"{REPLICATE}=2", f"{BATCH}=3"),
    _case("tp_2_ac_full", "with full activation checkpointing", 2, f"{TENSOR}=2", f"{AC}=full"),
    _case("tp_2_compile", "with compiled blocks", 2, f"{TENSOR}=2", *COMPILE),
    _case("tp_2_tied", "with one weight at both ends", 2, f"{TENSOR}=2", model="llama3_tied"),
    _case("tp_2_packed", "with masks of documents", 2, f"{TENSOR}=2", model="llama3_packed"),
)  # fmt: skip

_CONTEXT = (
    _case("cp_2", "context parallelism", 2, f"{CONTEXT}=2"),
    _case("cp_2_alltoall", "keys and values to whom they matter", 2, f"{CONTEXT}=2",
          "--parallelism.context_parallel_rotate_method=alltoall"),
    _case("cp_2_plain", "sequences cut once", 2, f"{CONTEXT}=2",
          "--parallelism.context_parallel_load_balancer=None"),
    _case("cp_2_heads", "heads exchanged for sequences", 2, f"{CONTEXT}=2",
          "--parallelism.context_parallel_method=heads"),
    _case("cp_4_packed", "with masks of documents", 4, f"{CONTEXT}=4", model="llama3_packed"),
    _case("cp_2_fsdp_2", "with FSDP", 4, f"{CONTEXT}=2", f"{BATCH}=6"),
    _case("cp_2_tp_2", "with tensor parallelism", 4, f"{CONTEXT}=2", f"{TENSOR}=2"),
    _case("cp_2_tp_2_fsdp_2", "with tensor parallelism and FSDP", 8, f"{CONTEXT}=2", f"{TENSOR}=2",
          f"{BATCH}=6"),
)  # fmt: skip

_PIPELINE = (
    _case("pp_2", "pipeline parallelism", 2, f"{PIPELINE}=2", launched=True),
    _case("pp_2_gpipe", "GPipe", 2, f"{PIPELINE}=2", f"{SCHEDULE}=GPipe", f"{BATCH}=6"),
    _case("pp_2_interleaved", "two stages a rank", 2, f"{PIPELINE}=2", f"{SCHEDULE}=Interleaved1F1B"),
    _case("pp_2_zero_bubble", "backward in two halves", 2, f"{PIPELINE}=2",
          f"{SCHEDULE}=InterleavedZeroBubble"),
    _case("pp_2_zbv", "stages in a V", 2, f"{PIPELINE}=2", f"{SCHEDULE}=ZBVZeroBubble"),
    _case("pp_2_dual_pipe_v", "DualPipeV", 2, f"{PIPELINE}=2", f"{SCHEDULE}=DualPipeV"),
    _case("pp_2_tied", "one weight on the first and last stage", 2, f"{PIPELINE}=2", model="llama3_tied"),
    _case("pp_2_packed", "with masks of documents", 2, f"{PIPELINE}=2", model="llama3_packed"),
    _case("pp_2_fsdp_2", "with FSDP", 4, f"{PIPELINE}=2", f"{BATCH}=6"),
    _case("pp_2_tp_2", "with tensor parallelism", 4, f"{PIPELINE}=2", f"{TENSOR}=2"),
    _case("pp_2_cp_2", "with context parallelism", 4, f"{PIPELINE}=2", f"{CONTEXT}=2"),
    _case("pp_2_fsdp_2_tp_2", "with FSDP and tensor parallelism", 8, f"{PIPELINE}=2", f"{TENSOR}=2",
          f"{BATCH}=6"),
)  # fmt: skip

_CHECKPOINTS = (
    _resumed("resume", "stop after two steps, go on", 1, (), (), launched=True),
    _resumed("resume_async", "checkpoints written beside training", 2, (f"{BATCH}=6",),
             (f"{BATCH}=6", "--checkpoint.async_mode=async", "--checkpoint.interval=1")),
    _resumed("resume_fsdp_to_tp", "go on by tensor parallelism", 2, (f"{BATCH}=6",), (f"{TENSOR}=2",)),
    _resumed("resume_tp_to_pp", "go on in a pipeline", 2, (f"{TENSOR}=2",), (f"{PIPELINE}=2",)),
    _resumed("resume_pp_to_cp", "go on by context parallelism", 2, (f"{PIPELINE}=2",), (f"{CONTEXT}=2",)),
)  # fmt: skip

# Rounding makes of the last bits of a sum, which layouts change, a step between neighbouring numbers. With
# a scale a row, a head's smallest probabilities are rounded by what else is in a microbatch.
_LOW_PRECISION = (
    _case("float8_rowwise_fsdp_2_tp_2", "float8, a scale for each row", 4, f"{TENSOR}=2", f"{BATCH}=6",
          model="llama3_rowwise", tolerance=1e-5),
    _case("float8_rowwise_pp_2", "float8 in stages, the head too", 2, f"{PIPELINE}=2",
          model="llama3_rowwise_head", tolerance=1e-4),  # seen: 2e-5
    _case("float8_gathered_fsdp_2", "weights gathered as float8", 2, f"{BATCH}=6",
          "--quantize.linear.float8.enable_fsdp_float8_all_gather",
          "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
          model="llama3_tensorwise", tolerance=1e-4, launched=True),
)  # fmt: skip

_OPTIMIZERS = (
    _case("muon_fsdp_2_tp_2", "Muon on matrices in four parts", 4, f"{TENSOR}=2", f"{BATCH}=6",
          model="llama3_muon"),
    _resumed("muon_resume_pp_to_fsdp", "Muon goes on on other ranks", 2, (f"{PIPELINE}=2",), (f"{BATCH}=6",),
             model="llama3_muon"),
    _case("muon_cpu_offload", "Muon on weights in host memory", 2, f"{BATCH}=6",
          "--training.enable_cpu_offload", model="llama3_muon"),
    _case("muon_ep_2", "Muon on the matrices of experts", 2, f"{EXPERT}=2", f"{BATCH}=6",
          model="qwen3_moe_muon"),
    _resumed("adamw_8bit_fsdp_2", "AdamW in 8 bits goes on, saved beside training", 2, (f"{BATCH}=6",),
             (f"{BATCH}=6", "--checkpoint.async_mode=async", "--checkpoint.interval=1"), model="llama3_8bit"),
)  # fmt: skip

FEATURES = (
    *_DATA, *_RECOMPUTATION, *_TENSOR, *_CONTEXT, *_PIPELINE, *_CHECKPOINTS, *_LOW_PRECISION, *_OPTIMIZERS
)  # fmt: skip


def _dense(model: str) -> tuple[OverrideDefinitions, ...]:
    layouts = {
        "fsdp_2": (2, f"{BATCH}=6"),
        "tp_2_no_sp": (2, f"{TENSOR}=2", NO_SP),
        "tp_2_fsdp_2": (4, f"{TENSOR}=2", f"{BATCH}=6", *BY_OP),
        "cp_2": (2, f"{CONTEXT}=2"),
        "pp_2": (2, f"{PIPELINE}=2"),
    }
    return _on_layouts(model, layouts)


def _with_experts(model: str) -> tuple[OverrideDefinitions, ...]:
    layouts = {
        "ep_2": (2, f"{EXPERT}=2", f"{BATCH}=6", *BY_OP),
        "tp_2_ep_2": (2, f"{TENSOR}=2", f"{EXPERT}=2"),
        "tp_2_ep_2_no_sp": (2, f"{TENSOR}=2", f"{EXPERT}=2", NO_SP, f"{AC}=full"),
        "cp_2_ep_2": (2, f"{CONTEXT}=2", f"{EXPERT}=2"),
        "pp_2_ep_2": (4, f"{PIPELINE}=2", f"{EXPERT}=2", f"{BATCH}=6"),
    }
    return _on_layouts(model, layouts)


def _on_layouts(model: str, layouts: dict[str, tuple]) -> tuple[OverrideDefinitions, ...]:
    return tuple(
        _case(f"{model}_{name}", f"{model} on {name}", *arguments, model=model)
        for name, arguments in layouts.items()
    )


_TOGETHER = (
    _case("qwen3_moe_fsdp_2_tp_2_etp", "experts split by tensor parallelism", 4, f"{TENSOR}=2",
          f"{EXPERT}=2", f"{EXPERT_TENSOR}=2", f"{BATCH}=6", model="qwen3_moe"),
    _case("qwen3_moe_pp_2_fsdp_2_tp_2_ep_4", "all together", 8, f"{PIPELINE}=2", f"{TENSOR}=2",
          f"{EXPERT}=4", f"{BATCH}=6", model="qwen3_moe"),
    _case("deepseek_v3_packed_cp_2_tp_2_ep_4", "documents over context and tensor parallel ranks", 4,
          f"{CONTEXT}=2", f"{TENSOR}=2", f"{EXPERT}=4", model="deepseek_v3_packed"),
    _case("qwen3_moe_float8_fsdp_2_ep_2", "experts in emulated float8, rows sent as float8", 4,
          f"{EXPERT}=2", f"{BATCH}=3", "--quantize.grouped_mm.float8.exchange_in_float8",
          model="qwen3_moe_float8"),
    _case("qwen3_moe_compile_ep_2", "compiled blocks beside an exchange", 2, f"{EXPERT}=2", f"{BATCH}=6",
          *COMPILE, model="qwen3_moe"),
    _resumed("qwen3_moe_resume_ep_to_tp", "experts go to other ranks", 2, (f"{EXPERT}=2", f"{BATCH}=6"),
             (f"{TENSOR}=2", f"{EXPERT}=2"), model="qwen3_moe"),
)  # fmt: skip

FAMILIES = (
    *_dense("qwen3"),
    *_dense("olmo2"),
    *_with_experts("qwen3_moe"),
    *_with_experts("deepseek_v3"),
    *_with_experts("gpt_oss"),
    *_with_experts("mixtral"),
    *_with_experts("llama4"),
    *_TOGETHER,
)

SUITES = {"features": FEATURES, "models": FAMILIES}
