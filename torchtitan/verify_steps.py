"""A few training steps of one rank, for the oracle: what it computed, and what it holds afterwards."""

import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan.build import build_model
from torchtitan.distributed.context_parallel import sequence_part
from torchtitan.distributed.fsdp import Precision
from torchtitan.distributed.grad_norm import global_grad_norm
from torchtitan.distributed.local_parts import local_part, place_of
from torchtitan.distributed.mesh import Degrees
from torchtitan.distributed.styles import loss_layout
from torchtitan.expert_load import ExpertLoad
from torchtitan.optim.optimizer import build_optimizer
from torchtitan.verify_case import Case
from torchtitan.verify_routing import Flips, Recorded, Recorder, Replayer

CPU = torch.device("cpu")

Sabotage = Callable[[nn.Module], None]
"""Breaks a layout's model on purpose, for the tests of this oracle."""


@dataclass(frozen=True)
class RankResult:
    """What one rank saw."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, torch.Tensor]]
    """Whole gradients of each step, from the first rank of each pipeline stage only."""
    shards: list[tuple[str, tuple[int, ...], bytes]]
    """After the steps, of each weight and buffer: its name, which part the rank holds, and the part's bytes."""
    loads: list[torch.Tensor]
    """Of each step, tokens by MoE layer and expert over the global batch."""
    recorded: Recorded
    """What the routers chose, where that was recorded."""
    flips: dict[str, Flips]
    """Where they would have chosen otherwise, where choices were repeated."""
    peak_mib: float


def run_steps(case: Case, sabotage: Sabotage | None, recorded: Recorded | None) -> RankResult:
    """Train this rank's part for a few steps; called inside a process group.

    Routers' choices are those of `recorded`, or are recorded where it is None.
    """
    # Gathering a weight that is split twice warns on every rank that it takes two collectives.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    config = case.config
    degrees = Degrees.resolve(config.parallelism, dist.get_world_size())
    precision = Precision(torch.float32, torch.float32, torch.float32)
    model = build_model(case.model_config, degrees, precision, config, CPU)
    for part in model.parts if sabotage is not None else ():
        sabotage(part)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    rank, training, parallelism = dist.get_rank(), config.training, config.parallelism
    part = sequence_part(parallelism, degrees, rank)
    recorder = Recorder(model, training.global_batch_size) if recorded is None else None
    split = degrees.tp // degrees.routing_copies(parallelism.enable_sequence_parallel)
    replayer = Replayer(model, part, split, rank % split, recorded or {})
    expert_load = ExpertLoad(model, case.model_config, degrees, parallelism)
    losses, norms, gradients, loads = [], [], [], []
    with loss_layout(degrees.tp, parallelism):
        for step, whole in enumerate(case.batches):
            batch, rows = whole.cut(part), degrees.slots(rank, len(whole.tokens))
            with replayer.repeat(step):
                loss = model.forward_backward(batch, rows, whole.num_valid_tokens, training)
            loss = loss / degrees.tp
            norm, loss = global_grad_norm(model.parameters(), loss, degrees.stage_size)
            losses.append(loss.item())
            norms.append(norm.item())
            gradients.append({name: _whole_gradient(p) for name, p in model.named_parameters()})
            optimizer.step()
            model.weights_changed()
            optimizer.zero_grad()
            expert_load.finish_step(stepped=True)
            loads += [] if expert_load.counts is None else [expert_load.counts]
    return RankResult(
        losses,
        norms,
        gradients if rank % degrees.stage_size == 0 else [],
        [(name, *_shard(t)) for part in model.parts for name, t in part.state_dict().items()],
        loads,
        {} if recorder is None else recorder.steps,
        replayer.seen,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def _whole_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Gathered over all ranks; a gradient that never came about is one of zeros."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def _shard(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return place_of(tensor), local_part(tensor).detach().contiguous().numpy().tobytes()
