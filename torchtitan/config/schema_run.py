"""Which keys say what a run is called, keeps and reports? Job, logging, profiling, checkpoints."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Job:
    """The run as a whole."""

    config_file: str | None = None
    """TOML file to read; given twice, the last one is read."""

    dump_folder: str = "./outputs"
    """Folder that everything the run writes goes under."""

    description: str = "default job"
    """Free text, logged at the start."""

    print_config: bool = False
    """Log the merged config at the start."""

    save_config_file: str | None = None
    """Also write the merged config as JSON to this path under job.dump_folder."""

    custom_config_module: str = ""
    """Module whose dataclass `JobConfig` adds sections and keys to this schema."""


@dataclass(frozen=True)
class Profiling:
    """Profiler traces and memory snapshots."""

    enable_profiling: bool = False
    """Record torch profiler traces."""

    save_traces_folder: str = "profile_traces"
    """Folder of the traces, under job.dump_folder."""

    profile_freq: int = 10
    """Steps from one trace, or memory snapshot, to the next."""

    profiler_active: int = 1
    """Steps recorded in each trace."""

    profiler_warmup: int = 3
    """Steps the profiler runs, unrecorded, before each trace."""

    enable_memory_snapshot: bool = False
    """Record the CUDA allocator's history and write it as snapshots."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the snapshots, under job.dump_folder."""


@dataclass(frozen=True)
class Metrics:
    """What is logged, how often, and to where."""

    log_freq: int = 10
    """Log every this many steps, and step 1."""

    enable_tensorboard: bool = False
    """Write TensorBoard events."""

    disable_color_printing: bool = False
    """Print the console line without colors."""

    save_tb_folder: str = "tb"
    """Folder of TensorBoard and Weights & Biases files, under job.dump_folder."""

    save_for_all_ranks: bool = False
    """Every rank writes TensorBoard or Weights & Biases metrics, not one alone."""

    enable_wandb: bool = False
    """Log to Weights & Biases, configured by its own environment variables."""


@dataclass(frozen=True)
class Checkpoint:
    """Saving and resuming."""

    enable: bool = False
    """Save checkpoints, and resume from the newest one in the folder."""

    enable_ft_dataloader_checkpoints: bool = True
    """With TorchFT: save the data loader's state per replica."""

    folder: str = "checkpoint"
    """Folder of the checkpoints, under job.dump_folder."""

    interval: int = 500
    """Steps between saves."""

    initial_load_path: str | None = None
    """Checkpoint to start from; ignored once the run has checkpoints of its own."""

    initial_load_model_only: bool = True
    """Take only the weights from initial_load_path, not the optimizer, step or data position."""

    initial_load_in_hf: bool = False
    """initial_load_path (or, without one, model.hf_assets_path) holds Hugging Face safetensors."""

    initial_load_in_hf_quantized: bool = False
    """Those safetensors are quantized and are dequantized on loading."""

    last_save_model_only: bool = True
    """The save after the last step holds only the weights."""

    last_save_in_hf: bool = False
    """The save after the last step is in Hugging Face safetensors."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Dtype of the weights in a last save that is model only."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Whether training goes on while a checkpoint is written, and through which memory."""

    keep_latest_k: int = 10
    """Checkpoints kept, newest first; 0 keeps all."""

    load_step: int = -1
    """Step to resume from; -1 is the newest."""

    exclude_from_loading: list[str] = field(default_factory=list)
    """Parts of a checkpoint not to load: optimizer, lr_scheduler, dataloader, train_state."""

    enable_first_step_checkpoint: bool = False
    """Also save after step 1, to find out early that saving works."""

    create_seed_checkpoint: bool = False
    """Save the initial weights from one process, and end."""

    load_only: bool = False
    """Load as usual but never save."""

    max_run_seconds: int | None = None
    """Ours. Seconds after its start at which the run saves and ends with status 75."""


@dataclass(frozen=True)
class Debug:
    """Reproducibility and switches for hunting bugs."""

    seed: int | None = None
    """Seed of weights and data order; None draws one, which is logged and saved."""

    deterministic: bool = False
    """Use deterministic algorithms only; the same run then gives the same bits on GPUs."""

    deterministic_warn_only: bool = False
    """With deterministic: warn where an operation has no such algorithm, instead of failing."""

    moe_force_load_balance: bool = False
    """Send tokens to experts in turn, whatever the router says; for benchmarks."""

    batch_invariant: bool = False
    """Ours. Compute each document's logits with the same bits in any batch and place; slower."""


@dataclass(frozen=True)
class MemoryEstimation:
    """Estimating peak memory without training."""

    enable: bool = False
    """Estimate peak memory instead of training."""

    disable_fake_mode: bool = False
    """Estimate with real tensors instead of fake ones."""


@dataclass(frozen=True)
class Experimental:
    """Hooks that may change without notice."""

    custom_import: str = ""
    """Module imported before the model is looked up, for example to register a model."""

    custom_args_module: str = ""
    """Deprecated: job.custom_config_module."""


@dataclass(frozen=True)
class HFTransformers:
    """Models run through the transformers library."""

    model: str = ""
    """Hugging Face id of the model."""
