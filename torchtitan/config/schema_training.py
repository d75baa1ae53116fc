"""Which keys say what is trained, on what, and how? Model, experts, data, optimizer, schedule."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Model:
    """Which model is trained."""

    name: str = "llama3"
    """Model family: a module of torchtitan/models."""

    flavor: str = "debugmodel"
    """Size or variant within the family."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Ours. Fields of the flavor to change: n_layers = 4, or --model.overrides.n_layers 4."""

    hf_assets_path: str = "./tests/assets/tokenizer"
    """Folder with the tokenizer and, where they are loaded, Hugging Face weights."""

    tokenizer_path: str | None = None
    """Deprecated: model.hf_assets_path."""

    converters: list[str] = field(default_factory=list)
    """What exchanges parts of the model before it is spread, in order: quantize.linear.float8 and
    the like, or a converter of your own; see docs/low_precision.md."""

    print_after_conversion: bool = False
    """Print the module tree after the converters have run."""

    @property
    def quantizes_experts(self) -> bool:
        """Whether a converter lets experts multiply in few bits."""
        return any(name.startswith("quantize.grouped_mm") for name in self.converters)


@dataclass(frozen=True)
class MoE:
    """How the experts of mixture-of-experts layers are computed."""

    experts_backend: Literal["auto", "reference"] = "auto"
    """Ours. What multiplies: the fastest that works, or blocks whose bits no other row changes."""

    max_rows_per_chunk: int = 0
    """Ours. Rows (a token times an expert) worked on at a time, to save memory; 0 is all."""

    sequence_balance_coeff: float = 0.0
    """Ours. Of a loss on the balance of experts within each sequence (DeepSeek-V3's)."""

    global_balance_coeff: float = 0.0
    """Ours. Of a loss on the balance of experts over the global batch, by the last step's load."""

    router_z_coeff: float = 0.0
    """Ours. Of a loss on the size of router logits (ST-MoE's z-loss)."""


@dataclass(frozen=True)
class Optimizer:
    """How weights are updated."""

    name: str = "AdamW"
    """Adam or AdamW; ours are AdamW8bit and Muon."""

    lr: float = 8e-4
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay of the running mean of gradients."""

    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""

    eps: float = 1e-8
    """Added to the denominator of the update."""

    weight_decay: float = 0.1
    """Weight decay of every parameter that no_decay does not match."""

    no_decay: list[str] = field(default_factory=list)
    """Ours. Parameters without weight decay, as patterns of their names: *norm*, *.bias."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    """Ours. Tables {patterns, lr_scale, weight_decay, optimizer} for the parameters they match."""

    bf16_stochastic_round: bool = False
    """Ours. Round weights in bfloat16 up or down by chance, so that small updates add up."""

    muon_momentum: float = 0.95
    """Ours. Decay of Muon's running mean of gradients."""

    muon_lr_adjustment: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Ours. How Muon's learning rate follows a matrix's shape: to updates of AdamW's size, or not."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How Adam's update runs: parameter by parameter, in batches, or as one fused kernel."""

    early_step_in_backward: bool = False
    """Update each parameter as soon as its gradient is ready, to free the gradient early."""

    @property
    def uses_torchao(self) -> bool:
        """Whether weights are updated by torchao's AdamW, in place of PyTorch's."""
        return self.name == "AdamW8bit" or self.bf16_stochastic_round


@dataclass(frozen=True)
class LRScheduler:
    """How the learning rate changes over the run."""

    warmup_steps: int = 200
    """Steps of linear warm-up from 0 to optimizer.lr."""

    total_steps: int | None = None
    """Length of the schedule; None is training.steps."""

    decay_ratio: float | None = None
    """Share of the schedule that decays, at its end; None decays from the end of warm-up."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""

    min_lr_factor: float = 0.0
    """Where the decay ends, as a fraction of optimizer.lr."""


@dataclass(frozen=True)
class DataLoader:
    """How batches are prepared beside the training loop."""

    num_workers: int = 0
    """Worker processes; 0 prepares batches in the training process."""

    persistent_workers: bool = False
    """Keep the workers from one epoch to the next."""

    pin_memory: bool = False
    """Put batches in pinned host memory, which copies to a GPU faster."""

    prefetch_factor: int | None = None
    """Batches each worker prepares ahead; None is PyTorch's default."""


@dataclass(frozen=True)
class Training:
    """Data, batch, length and precision of the training loop."""

    dataset: str | dict[str, Any] | list[dict[str, Any]] = "c4_test"
    """A registered name, files by path or pattern, or (ours) tables {path or name, weight, ...}."""

    dataset_path: str | None = None
    """Local files to read in place of the registered dataset's own."""

    repeat: bool = True
    """Ours. Begin the next epoch where the data ends; false ends the run after one pass."""

    shuffle: bool = True
    """Ours. Read documents in an order drawn anew for every epoch."""

    local_batch_size: int = 8
    """Sequences per data-parallel rank in one microbatch."""

    global_batch_size: int = -1
    """Sequences per optimizer step, over all ranks; -1 is one microbatch of every rank."""

    seq_len: int = 2048
    """Tokens per sequence."""

    max_norm: float | int = 1.0
    """Gradients are scaled down to this global norm where theirs is larger."""

    steps: int = 10000
    """Optimizer steps to train."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Ours. What a loss or gradient that is not finite does: end the run, or skip the step."""

    max_skipped_steps: int = 10
    """Ours. Steps skipped in a row after which the run ends all the same."""

    sync_gradients_each_microbatch: bool = False
    """Ours. Reduce gradients after every microbatch: less memory, more communication."""

    enable_cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory."""

    dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype parameters are created and updated in."""

    mixed_precision_param: Literal["bfloat16", "float32"] | None = None
    """Dtype of computation; unset is bfloat16, or float32 on a device slow in bfloat16 (CPUs)."""

    mixed_precision_reduce: Literal["float32"] = "float32"
    """Dtype gradients are reduced in."""

    gc_freq: int = 50
    """Steps from one collection of Python garbage to the next; automatic collection is off."""

    gc_debug: bool = False
    """Collect garbage every step and report reference cycles."""

    dataloader: DataLoader = field(default_factory=DataLoader)
    """How batches are prepared beside the training loop."""


@dataclass(frozen=True)
class Validation:
    """Loss on held-out data during training."""

    enable: bool = False
    """Validate during training."""

    dataset: str = "c4_validation"
    """A registered name, or files by path or pattern."""

    dataset_path: str | None = None
    """Local files to read in place of the registered dataset's own."""

    local_batch_size: int = 8
    """Sequences per data-parallel rank in one batch."""

    seq_len: int = 2048
    """Tokens per sequence."""

    freq: int = 10
    """Validate every this many steps, and after step 1."""

    steps: int = -1
    """Batches per validation; -1 is the whole dataset."""

    dataloader: DataLoader = field(default_factory=DataLoader)
    """How batches are prepared beside validation."""
