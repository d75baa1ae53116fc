"""Which keys does a run have? The root of the configuration: sections, their keys and defaults.

Every key is a field of a frozen dataclass, `config.<section>.<key>`, with one docstring that
`--help` and docs/configuration.md show. Names and defaults are those of upstream torchtitan's
last TOML release, so that its files load here unchanged; keys marked "Ours" were added.
"""

from dataclasses import dataclass, field

from torchtitan.config.schema_parallelism import (
    ActivationCheckpoint,
    Comm,
    Compile,
    FaultTolerance,
    Parallelism,
)
from torchtitan.config.schema_quantize import Quantize
from torchtitan.config.schema_run import (
    Checkpoint,
    Debug,
    Experimental,
    HFTransformers,
    Job,
    MemoryEstimation,
    Metrics,
    Profiling,
)
from torchtitan.config.schema_training import (
    LRScheduler,
    Model,
    MoE,
    Optimizer,
    Training,
    Validation,
)


@dataclass(frozen=True)
class JobConfig:
    """Everything that describes one training run."""

    job: Job = field(default_factory=Job)
    """The run as a whole: where its config comes from, where its output goes."""

    profiling: Profiling = field(default_factory=Profiling)
    """Profiler traces and memory snapshots."""

    metrics: Metrics = field(default_factory=Metrics)
    """What is logged, how often, and to where."""

    model: Model = field(default_factory=Model)
    """Which model is trained."""

    moe: MoE = field(default_factory=MoE)
    """How the experts of mixture-of-experts layers are computed."""

    optimizer: Optimizer = field(default_factory=Optimizer)
    """How weights are updated."""

    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    """How the learning rate changes over the run."""

    training: Training = field(default_factory=Training)
    """Data, batch, length and precision of the training loop."""

    parallelism: Parallelism = field(default_factory=Parallelism)
    """How the model and the batch are spread over the ranks."""

    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saving and resuming."""

    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    """Which activations are recomputed in backward instead of kept."""

    compile: Compile = field(default_factory=Compile)
    """torch.compile."""

    quantize: Quantize = field(default_factory=Quantize)
    """Low-precision matrix products, in effect for the converters named in model.converters."""

    comm: Comm = field(default_factory=Comm)
    """Process groups: timeouts and the flight recorder."""

    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    """Estimating peak memory without training."""

    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    """Training that survives the loss of replicas (TorchFT)."""

    experimental: Experimental = field(default_factory=Experimental)
    """Hooks that may change without notice."""

    validation: Validation = field(default_factory=Validation)
    """Loss on held-out data during training."""

    debug: Debug = field(default_factory=Debug)
    """Reproducibility and switches for hunting bugs."""

    hf_transformers: HFTransformers = field(default_factory=HFTransformers)
    """Models run through the transformers library."""
