"""Which kernels multiply experts? Where there are two kinds, rank 0 measures both, and all use the faster.

T tokens, K top-k, D model, F expert width, E experts, e of them on a rank; R = T * K rows.
"""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan import routing
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.fsdp import Precision
from torchtitan.distributed.mesh import Degrees
from torchtitan.logging import logger
from torchtitan.model_parts import ModelParts
from torchtitan.models.decoder import DecoderConfig
from torchtitan.models.moe.experts import GroupedExperts
from torchtitan.ops.expert_kernels import can_fuse
from torchtitan.ops.experts import trial

CANDIDATES = ("fused", "unfused")
FILE = "expert_kernels.json"
"""In the run's folder: the choice and the candidates' milliseconds, by what they were measured on."""

_WARM_UPS, _REPEATS, _IN_A_ROW = 3, 7, 4
"""Steps between two events hide a step's launches behind the step before, as in training."""


@dataclass(frozen=True)
class Shape:
    """What the experts of a layer work on at a time on one rank, if all experts get equally much."""

    dim: int
    hidden_dim: int
    """This rank's part of F."""
    num_experts: int
    """e"""
    num_tokens: int
    """T, of which each has K rows here."""
    top_k: int
    activation: str
    weighted: bool
    """Rows are weighted by the experts, not before them."""
    gathered: bool
    """The experts gather rows and sum them by themselves, as where nothing comes from other ranks."""

    @classmethod
    def of(cls, config: DecoderConfig, degrees: Degrees, num_tokens: int) -> "Shape":
        """`num_tokens` are of whole sequences, as many as go through the model at a time."""
        moe, weighted = config.moe, not config.moe.score_before_experts
        # Ranks that hold whole experts dispatch parts of their group's tokens, the others all of them.
        parts = degrees.cp * degrees.tp // degrees.etp
        return cls(
            config.dim,
            moe.ffn_dim // degrees.etp,
            moe.num_experts // degrees.ep,
            -(-num_tokens // parts),
            moe.top_k,
            moe.activation,
            weighted,
            gathered=weighted and degrees.ep == 1,
        )

    def __str__(self) -> str:
        how = [self.activation, *(name for name in ("weighted", "gathered") if getattr(self, name))]
        return (
            f"{self.num_experts} experts of width {self.hidden_dim} x {self.dim}, {self.num_tokens} tokens "
            f"x {self.top_k}, {', '.join(how)}"
        )


def choose_expert_kernels(
    model: ModelParts,
    model_config: DecoderConfig,
    degrees: Degrees,
    precision: Precision,
    config: JobConfig,
) -> None:
    """Have experts multiply by the faster one of `CANDIDATES` where both can, in place; collective.

    Where the choice is not open, the rule of shape of ops/expert_kernels.py stays ("auto").
    """
    if not _is_open(model_config, config):
        return
    training, pipeline = config.training, model.pipeline
    num_sequences = training.local_batch_size if pipeline is None else pipeline.microbatch_size
    shape = Shape.of(model_config, degrees, num_sequences * training.seq_len)
    backend = ["auto"]
    # Only rank 0 asks what its GPU can: ranks that answered otherwise would not meet here.
    if dist.get_rank() == 0 and can_fuse(precision.compute, model.device, shape.hidden_dim, shape.dim):
        backend = [faster(shape, model.device, Path(config.job.dump_folder) / FILE)]
    dist.broadcast_object_list(backend)
    for _, module in model.named_modules():
        if isinstance(module, GroupedExperts) and module.backend == "auto":
            module.backend = backend[0]


def _is_open(model_config: DecoderConfig, config: JobConfig) -> bool:
    """Whether the config, which all ranks share, leaves a choice between kernels."""
    if not model_config.n_moe_layers or config.debug.deterministic:
        return False
    moe = model_config.moe
    fusible = not moe.experts_bias and not moe.max_rows_per_chunk
    return fusible and moe.experts_backend == "auto" and not config.model.quantizes_experts


def faster(shape: Shape, device: torch.device, path: Path) -> str:
    """The candidate that took less time when it was measured, now or as the file at `path` says.

    "auto" where they could not be measured.
    """
    key = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: {shape}"
    stored = _read(path)
    known = stored.get(key)
    if isinstance(known, dict) and known.get("backend") in (*CANDIDATES, "auto"):
        logger.info(f"experts' kernels: {known['backend']}, as {path} says ({shape})")
        return known["backend"]
    times = measure(shape, device)
    best = min(times, key=times.get) if times else "auto"
    if times:
        figures = ", ".join(f"{name} {milliseconds:.3f} ms" for name, milliseconds in times.items())
        logger.info(f"experts' kernels: {best}; forward and backward take {figures} ({shape}; kept in {path})")
    _write(path, stored | {key: {"backend": best, "milliseconds": times}})
    return best


def _read(path: Path) -> dict[str, object]:
    """What was chosen before; nothing where the file is damaged. It is no reason to end a run."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict):
        return content
    logger.warning(f"{path} cannot be read: experts' kernels are measured again")
    return {}


def _write(path: Path, content: dict[str, object]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")  # other runs may share the folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        logger.warning(f"the choice of experts' kernels is not kept: {error}")


def measure(shape: Shape, device: torch.device) -> dict[str, float]:
    """Milliseconds of a layer's experts by candidate, medians; none where one of them cannot run.

    Leaves no trace in memory, nor in the allocator's peaks and counts of failures.
    """
    try:
        with trial():
            times = _take_turns(shape, device)
    # Too little memory, or a kernel that does not compile: other ranks wait, and a rule can choose.
    except Exception as error:
        logger.warning(f"experts' kernels are chosen by rule, for they could not be measured ({shape}): {error}")
        times = {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.reset_accumulated_memory_stats(device)
    return times


def _take_turns(shape: Shape, device: torch.device) -> dict[str, float]:
    experts, step = _workload(shape, device)
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for name in CANDIDATES:
        experts.backend = name
        for _ in range(_WARM_UPS):
            step()
    for _ in range(_REPEATS):
        for name in CANDIDATES:
            experts.backend = name
            times[name].append(_milliseconds(step))
    return {name: statistics.median(values) for name, values in times.items()}


def _workload(
    shape: Shape, device: torch.device
) -> tuple[GroupedExperts, Callable[[], object]]:
    """Experts, and their forward and backward."""
    generator = torch.Generator(device).manual_seed(0)  # not the run's
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    with torch.device("meta"):
        experts = GroupedExperts(
            shape.dim, shape.hidden_dim, shape.num_experts, 0.02, activation=shape.activation
        )
    experts = experts.bfloat16().to_empty(device=device)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(std=0.02, generator=generator)
    num_rows = shape.num_tokens * shape.top_k
    ids = torch.arange(num_rows, device=device).view(-1, shape.top_k) % shape.num_experts
    counts = routing.count_tokens(ids, shape.num_experts)
    order = routing.sort_by_expert(ids) if shape.gathered else None
    scored = (shape.num_tokens, shape.top_k) if shape.gathered else (num_rows,)
    size = (scored[0], shape.dim)
    x, upstream = torch.randn(size, **options, requires_grad=True), torch.randn(size, **options)
    scores = torch.rand(scored, device=device, generator=generator, requires_grad=True)
    leaves = [x, *experts.parameters(), *([scores] if shape.weighted else [])]

    def step():
        y = experts(x, counts, scores if shape.weighted else None, order)
        return torch.autograd.grad(y, leaves, upstream)

    return experts, step


def _milliseconds(step: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()  # not measured: launches of those that are hide behind it
    start.record()
    for _ in range(_IN_A_ROW):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _IN_A_ROW
