"""What a layout comes to, on any number of ranks, without them: `comm.mode = "fake_backend"`.

One process is the first rank of each place in the pipeline in turn. Its model is real but for the numbers in it;
it takes two steps among process groups without peers, while memory is added up and collectives are
counted. Neither a GPU nor data nor a tokenizer is needed.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from torchtitan.build import build_model
from torchtitan.config.batch_size import global_batch_size
from torchtitan.config.faults import ConfigError
from torchtitan.config.schema import JobConfig
from torchtitan.config.without_gpus import without_gpus
from torchtitan.data.batch import Batch
from torchtitan.distributed.cast_copy import cast_copy
from torchtitan.distributed.context_parallel import sequence_part
from torchtitan.distributed.fake import CollectiveCounter, fake_ranks, skip_vote
from torchtitan.distributed.fsdp import Precision
from torchtitan.distributed.grad_norm import clip_factor, global_grad_norm
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.live_memory import LiveMemory
from torchtitan.distributed.local_parts import local_part
from torchtitan.distributed.mesh import Degrees, Meshes
from torchtitan.distributed.styles import loss_layout
from torchtitan.expert_load import ExpertLoad
from torchtitan.models.attention_mask import Documents
from torchtitan.models.decoder import Decoder, DecoderConfig
from torchtitan.ops.cross_entropy import EXACT, both_sides, chunked_linear_cross_entropy
from torchtitan.optim.optimizer import build_optimizer, take_step
from torchtitan.optim.state import held_tensors
from torchtitan.preflight import check_converted, checked_model
from torchtitan.quantization.converters import emulated

CPU = torch.device("cpu")
SECONDS_A_STAGE = 600
_COMPILER = "aot_eager_decomp_partition"
"""Keeps for backward what torch's default keeps, and writes no code."""


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over one axis in one step: what a rank calls and puts in."""

    axis: str
    kind: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class StageReport:
    """One rank's part: the first with its stages of a pipeline."""

    rank: int
    num_parameters: int
    bytes: dict[str, int]
    """Of weights, gradients and optimizer state."""
    peak_bytes: int
    """The most that all tensors together hold in forward and backward."""
    traffic: list[Traffic]


def dry_run(config: JobConfig, world_size: int) -> Iterator[str]:
    """The report, line by line. Raises ConfigError with every fault of the config."""
    start = time.perf_counter()
    config, model, degrees, notes = _settle(config, world_size)
    precision = _precision(config)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in model.build().parameters())
    axes = ", ".join(f"{name} {size}" for name, size in vars(degrees).items() if size > 1)
    yield (
        f"{config.model.name} {config.model.flavor}: {num_parameters:,} parameters, stored in "
        f"{precision.store}, computed in {precision.compute}"
    )
    training = config.training
    yield (
        f"{world_size} ranks that are not there: {axes or 'one rank'}; {training.global_batch_size} "
        f"sequences of {training.seq_len} tokens a step"
    )
    yield from notes
    for stage in range(degrees.pp):
        part = (config, model, degrees, stage * degrees.stage_size, world_size)
        if degrees.pp == 1:
            yield from _lines(_be(*part))
        else:  # a process for each: DTensor remembers the meshes of the rank that it was
            yield from _lines(*run_ranks(_be_in_fork, 1, *part, timeout=SECONDS_A_STAGE))
    ranks = f"of {degrees.pp} ranks, the first of each pipeline rank's" if degrees.pp > 1 else "of one rank"
    yield f"two steps {ranks}: {time.perf_counter() - start:.1f} s"


def _settle(
    config: JobConfig, world_size: int
) -> tuple[JobConfig, DecoderConfig, Degrees, list[str]]:
    """What is run dry, and in words what of the config cannot be."""
    model, faults = checked_model(config)
    try:
        degrees = Degrees.resolve(config.parallelism, world_size)
        batch_size = global_batch_size(config.training, degrees.dp)
        if model and config.model.converters:
            check_converted(model, config, degrees)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    notes = []
    if (emulation := emulated(config)) != config:
        notes.append("low precision: emulated, so weights and exchanges are those of the real one")
        config = emulation
    config = replace(
        config,
        training=replace(config.training, global_batch_size=batch_size),
        parallelism=without_gpus(config.parallelism, notes),
        compile=replace(config.compile, backend=_COMPILER),
    )
    return config, model, degrees, notes


def _precision(config: JobConfig) -> Precision:
    """As on a GPU, for which dry runs are: computed in bfloat16 where nothing is said."""
    training = config.training
    names = (training.dtype, training.mixed_precision_param or "bfloat16", training.mixed_precision_reduce)
    return Precision(*(getattr(torch, name) for name in names))


def _be_in_fork(*part) -> StageReport:
    torch.distributed.destroy_process_group()  # of the fork
    return _be(*part)


def _be(
    config: JobConfig, model_config: DecoderConfig, degrees: Degrees, rank: int, world_size: int
) -> StageReport:
    """Be one rank for two steps; the report is of the second."""
    with fake_ranks(rank, world_size) as fake:
        precision = _precision(config)
        model = build_model(model_config, degrees, precision, config, CPU, fake)
        if model.pipeline is not None:
            skip_vote(model.pipeline.schedule)
        axes = _axis_names(degrees.meshes("cpu"))
        expert_load = ExpertLoad(model, model_config, degrees, config.parallelism)
        batch = _empty_batch(config, degrees).cut(sequence_part(config.parallelism, degrees, rank))
        rows = range(len(batch.tokens))
        for part in model.parts:
            _count_as_on_gpus(part)

        def step(memory: AbstractContextManager) -> list[torch.Tensor]:
            with memory:
                loss = model.forward_backward(batch, rows, 1, config.training)
            norm, _ = global_grad_norm(model.parameters(), loss, degrees.stage_size)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            take_step(optimizer, clip_factor(norm, config.training.max_norm))
            model.weights_changed()
            expert_load.finish_step(stepped=True)
            optimizer.zero_grad()
            return gradients

        counter = CollectiveCounter()
        with fake, loss_layout(degrees.tp, config.parallelism):
            optimizer = build_optimizer(model.named_parameters(), config.optimizer, precision.compute)
            step(nullcontext())  # the first one makes what later ones have
            moments = list(held_tensors(optimizer.state))
            weights = list(model.parameters())
            copies = [copy.tensor for weight in weights if (copy := cast_copy(weight)) is not None]
            memory = LiveMemory(map(local_part, [*weights, *copies, *moments]))
            with counter:
                gradients = step(memory)
        sizes = {"weights": [*weights, *copies], "gradients": gradients, "optimizer state": moments}
        return StageReport(
            rank,
            sum(local_part(weight).numel() for weight in weights),
            {name: sum(local_part(t).nbytes for t in tensors) for name, tensors in sizes.items()},
            memory.peak,
            [
                Traffic(axes[ranks], kind, calls, counter.bytes[kind, ranks])
                for (kind, ranks), calls in counter.calls.items()
                if len(ranks) > 1
            ],
        )


def _count_as_on_gpus(part: Decoder) -> None:
    """Where GPUs have kernels that take less memory than a CPU's: attention with masks, and the loss."""

    def documents(lengths: list[list[int]], device: torch.device) -> Documents | None:
        found = Decoder.documents(part, lengths, device)
        return found and replace(found, masks=dict.fromkeys(found.masks))

    def loss(logits: torch.Tensor, labels: torch.Tensor, needs_gradient: bool):
        return torch.empty_like(labels, dtype=torch.float32), both_sides(logits, needs_gradient)

    part.documents = documents
    if part.output is not None and part.output.loss is chunked_linear_cross_entropy:
        part.output.loss = partial(part.output.loss, products=replace(EXACT, loss=loss))


def _empty_batch(config: JobConfig, degrees: Degrees) -> Batch:
    """A rank's share of a batch, of whole sequences that are one document each."""
    training = config.training
    shape = (training.global_batch_size // degrees.dp, training.seq_len)
    tokens = torch.zeros(shape, dtype=torch.int64)
    return Batch(tokens, tokens, [[training.seq_len]] * shape[0], tokens.numel(), exhausted=False)


def _axis_names(meshes: Meshes) -> dict[tuple[int, ...], str]:
    """The mesh axis that each group of ranks is; two, where the experts' view has the same group."""
    groups = {tuple(range(torch.distributed.get_world_size())): ["world"]}
    for mesh in (meshes.dense, meshes.experts, meshes.cp):
        for axis in mesh.mesh_dim_names if mesh is not None else ():
            ranks = tuple(torch.distributed.get_process_group_ranks(mesh.get_group(axis)))
            groups.setdefault(ranks, []).append(axis)
    return {ranks: "/".join(dict.fromkeys(names)) for ranks, names in groups.items()}


def _lines(report: StageReport) -> Iterator[str]:
    gib = {name: size / 2**30 for name, size in report.bytes.items()}
    parts = ", ".join(f"{name} {size:.2f}" for name, size in gib.items())
    yield (
        f"rank {report.rank} holds {report.num_parameters:,} parameters: "
        f"{sum(gib.values()):.2f} GiB ({parts})"
    )
    kept = gib["weights"] + gib["optimizer state"]
    peak = report.peak_bytes / 2**30
    yield (
        f"  {peak:.2f} GiB where forward and backward hold most: {peak - kept:.2f} of activations, "
        "gradients and gathered weights beside weights and optimizer state"
    )
    yield f"  {'axis':12} {'collective':16} {'calls':>7} {'MiB':>12}   in a step"
    for row in sorted(report.traffic, key=lambda row: (row.axis, row.kind)):
        yield f"  {row.axis:12} {row.kind:16} {row.calls:7,} {row.bytes / 2**20:12,.1f}"
