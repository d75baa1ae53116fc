"""Which dispatcher brings tokens to experts on other ranks? What expert_parallel_comm_backend says."""

import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import JobConfig, Parallelism
from torchtitan.distributed.expert_parallel.all_to_all import AllToAllTokenDispatcher
from torchtitan.distributed.expert_parallel.peer_exchange import PeerExchange, Sizes
from torchtitan.distributed.expert_parallel.peer_memory import SymmetricMemory
from torchtitan.distributed.expert_parallel.symmetric_memory import SymmetricMemoryTokenDispatcher
from torchtitan.distributed.mesh import Degrees, Meshes
from torchtitan.logging import logger

_KEY = "parallelism.expert_parallel_comm_backend"
_STANDARD = 'Use "standard".'


def check_comm_backend(config: Parallelism, device: torch.device, world_size: int) -> None:
    """Raise ConfigError where the dispatcher that is asked for cannot work here."""
    backend, ep = config.expert_parallel_comm_backend, config.expert_parallel_degree
    if backend == "standard":
        return
    reason = ""
    if ep == 1:
        reason = "carries tokens to experts on other ranks, and expert_parallel_degree is 1."
    elif device.type != "cuda":
        reason = "needs GPUs; this machine trains on its CPU."
    elif backend == "symmetric_memory":
        span = ep * config.expert_tensor_parallel_degree
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("NGPU") or world_size)
        if local % span:
            reason = f"a layer's experts are on {span} ranks, and a host has {local}: not within one."
        elif not _reach_each_other(min(local, torch.cuda.device_count())):
            reason = "the GPUs of this host do not reach each other's memory."
    if reason:
        raise ConfigError([Fault(_KEY, reason, _STANDARD, backend)])


def _reach_each_other(num_gpus: int) -> bool:
    pairs = [(a, b) for a in range(num_gpus) for b in range(num_gpus) if a != b]
    return all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)


def set_dispatchers(
    layers: Sequence[nn.Module],
    degrees: Degrees,
    meshes: Meshes,
    config: JobConfig,
    dtype: torch.dtype,
) -> None:
    """Have these MoE layers, all of one shape, send tokens of `dtype` to experts on other ranks.

    Collective where memory is shared: ranks that share a layer's experts call it together.
    """
    if not layers:
        return
    own_tokens = degrees.route_own_tokens(config.parallelism.enable_sequence_parallel)
    # With etp = tp each rank sends all tokens to the ranks that hold its own part of the experts.
    slices = degrees.tp if degrees.etp == 1 and not own_tokens else 1
    place = {
        "sp_size": slices,
        "sp_rank": meshes.dense["tp"].get_local_rank() if slices > 1 else 0,
    }
    mesh = meshes.experts["ep"]
    if config.parallelism.expert_parallel_comm_backend == "symmetric_memory":
        parts = degrees.cp * (degrees.tp if own_tokens else slices)
        sizes = _sizes(layers[0], degrees.ep, -(-_most_tokens(config) // parts), config.parallelism)
        device = torch.device("cuda", torch.cuda.current_device())
        open_memory = partial(SymmetricMemory, mesh.get_group(), device=device)
        make = partial(
            SymmetricMemoryTokenDispatcher, PeerExchange(sizes, dtype, open_memory)
        )
    else:
        make = partial(AllToAllTokenDispatcher, mesh)
    for layer in layers:
        local = layer.dispatcher
        layer.dispatcher = make(local.num_experts, local.score_before_experts, **place)


def _most_tokens(config: JobConfig) -> int:
    """Of whole sequences that go through the model at a time, in training or validation."""
    sections = [config.training, *([config.validation] if config.validation.enable else [])]
    parallelism = config.parallelism
    pipeline = parallelism.pipeline_parallel_degree > 1
    size = parallelism.pipeline_parallel_microbatch_size if pipeline else float("inf")
    return max(min(size, section.local_batch_size) * section.seq_len for section in sections)


def _sizes(layer: nn.Module, ep: int, num_tokens: int, config: Parallelism) -> Sizes:
    moe, dim = layer.config, layer.router.gate.in_features
    factor = config.symmetric_memory_capacity_factor
    sizes = Sizes(ep, num_tokens, moe.top_k, dim, moe.num_experts, factor)
    bound = "as many as there can be" if sizes.num_rows == sizes.worst_case else "more end the run"
    logger.info(
        f"symmetric memory: {num_tokens} tokens at a time; each layer's experts have room for "
        f"{sizes.num_rows} rows of {dim}, {factor:g} times the mean ({bound})"
    )
    return sizes
