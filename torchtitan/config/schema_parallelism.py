"""Which keys say how a run is spread over devices? Parallel degrees, recomputation, comm."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Parallelism:
    """How the model and the batch are spread over the ranks."""

    data_parallel_replicate_degree: int = 1
    """Replicas of the model; with a shard degree above 1 this is HSDP."""

    data_parallel_shard_degree: int = -1
    """Ranks that the parameters are sharded over (FSDP); -1 is all that other degrees leave."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after forward; default does so except with pipeline stages."""

    tensor_parallel_degree: int = 1
    """Ranks that each matrix product is split over."""

    enable_sequence_parallel: bool = True
    """Ours. With tensor parallelism: split activations between matrix products by sequence."""

    disable_loss_parallel: bool = False
    """With tensor parallelism: gather the logits instead of computing the loss on shards."""

    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with matrix products; needs a compiled model."""

    pipeline_parallel_degree: int = 1
    """Ranks that the layers are split over (ranks, not stages)."""

    module_fqns_per_model_part: list[list[str]] | None = None
    """Modules of each pipeline stage by name; None splits the layers evenly."""

    pipeline_parallel_first_stage_less_layers: int = 1
    """Layers the first stage has less, as it also holds the embedding."""

    pipeline_parallel_last_stage_less_layers: int = 1
    """Layers the last stage has less, as it also holds the output."""

    pipeline_parallel_layers_per_stage: int | None = None
    """Layers per pipeline stage; None is one stage, or two for interleaved schedules, a rank."""

    pipeline_parallel_schedule: str = "1F1B"
    """Schedule, by the name of its class in torch.distributed.pipelining."""

    pipeline_parallel_schedule_csv: str | None = ""
    """CSV file with the schedule, for the schedules that read one."""

    pipeline_parallel_microbatch_size: int = 1
    """Sequences per pipeline microbatch."""

    pipeline_parallel_expert_parallel_overlap: bool = True
    """With the DualPipeV schedule: overlap experts' communication with the pipeline."""

    context_parallel_degree: int = 1
    """Ranks that each sequence is split over."""

    context_parallel_method: Literal["kv", "heads"] = "kv"
    """Ours. What ranks exchange in attention: keys and values, or heads for sequences (Ulysses)."""

    context_parallel_load_balancer: str | None = "headtail"
    """With kv: cut sequences so that ranks work equally (headtail), or None for plain cuts."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """With kv: give all keys and values to all ranks, or to each rank those that it can see."""

    expert_parallel_degree: int = 1
    """Ranks that the experts of a layer are spread over."""

    expert_tensor_parallel_degree: int = 1
    """Ranks that each expert is split over: 1, or the tensor-parallel degree."""

    expert_parallel_comm_backend: Literal["standard", "deepep", "symmetric_memory"] = "standard"
    """How tokens reach their experts: PyTorch's all-to-all, DeepEP, or (ours) memory that GPUs share."""

    symmetric_memory_capacity_factor: float = 2.0
    """Ours. Rows that a rank's experts have room for, over the mean; more end the run."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    """Which activations are recomputed in backward instead of kept."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """Recompute some of each layer, all of it, what the compiler chooses, or nothing."""

    selective_ac_option: str = "2"
    """With selective: "op" keeps costly operations' results; "n" recomputes every n-th layer."""

    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(
        default_factory=lambda: ["moe.router.gate"]
    )
    """With "op": matrix products shaped like those of these Linears are always recomputed."""

    early_stop: bool = False
    """End a recomputation as soon as everything that backward needs exists."""

    memory_budget: float = 0.5
    """With memory_budget: share of activation memory kept, from 0 (recompute all) to 1."""

    visualize_memory_budget_pareto: bool = False
    """With memory_budget: write the trade-off of memory and time as SVG to the dump folder."""

    preserve_rng_state: bool = False
    """Recompute with the random numbers of the first forward."""

    determinism_check: str = "default"
    """torch.utils.checkpoint's check that a recomputation matches: default or none."""

    debug: bool = False
    """Have torch.utils.checkpoint trace operations, to explain a mismatch."""


@dataclass(frozen=True)
class Compile:
    """torch.compile."""

    enable: bool = False
    """Compile the components."""

    components: list[str] = field(default_factory=lambda: ["model", "loss"])
    """What is compiled: model (each block), loss (of logits that tensor parallelism splits)."""

    backend: str = "inductor"
    """Backend of torch.compile."""


@dataclass(frozen=True)
class Comm:
    """Process groups: timeouts and the flight recorder."""

    init_timeout_seconds: int = 300
    """Timeout of communication until the first step is done."""

    train_timeout_seconds: int = 100
    """Timeout of communication after it."""

    trace_buf_size: int = 20000
    """Collectives the flight recorder remembers; 0 turns it off."""

    save_traces_folder: str = "comm_traces"
    """Folder of the flight recorder's files, under job.dump_folder."""

    save_traces_file_prefix: str = "rank_"
    """What the names of those files begin with; the rank follows."""

    mode: Literal["default", "fake_backend", "local_tensor"] = "default"
    """Real ranks, one rank that communicates with nobody, or all ranks in one process."""


@dataclass(frozen=True)
class FaultTolerance:
    """Training that survives the loss of replicas (TorchFT)."""

    enable: bool = False
    """Train in replica groups coordinated by TorchFT."""

    process_group: str = "gloo"
    """Backend between replica groups: gloo or nccl."""

    process_group_timeout_ms: int = 10000
    """Timeout between replica groups, of gloo."""

    replica_id: int = 0
    """Which replica group this is."""

    group_size: int = 0
    """Number of replica groups."""

    min_replica_size: int = 1
    """Fewest live replica groups a step may run with."""

    semi_sync_method: str | None = None
    """How replica groups synchronise less than every step: local_sgd or diloco."""
