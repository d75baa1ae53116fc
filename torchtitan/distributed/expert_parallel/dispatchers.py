"""Which dispatcher brings tokens to experts on other ranks? What expert_parallel_comm_backend says."""

import importlib
import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import JobConfig, Parallelism
from torchtitan.distributed.expert_parallel.all_to_all import AllToAllTokenDispatcher
from torchtitan.distributed.expert_parallel.deepep import DeepEPTokenDispatcher, open_buffer
from torchtitan.distributed.expert_parallel.peer_exchange import PeerExchange, Sizes
from torchtitan.distributed.expert_parallel.peer_memory import SymmetricMemory
from torchtitan.distributed.expert_parallel.symmetric_memory import SymmetricMemoryTokenDispatcher
from torchtitan.distributed.expert_parallel.torchao import TorchAOTokenDispatcher
from torchtitan.distributed.mesh import Degrees, Meshes
from torchtitan.logging import logger

_KEY = "parallelism.expert_parallel_comm_backend"


def check_comm_backend(config: JobConfig, device: torch.device, world_size: int) -> None:
    """Raise ConfigError where the dispatcher that is asked for cannot work here."""
    backend = config.parallelism.expert_parallel_comm_backend
    if backend == "standard":
        return
    if config.parallelism.expert_parallel_degree == 1:
        reason = "carries tokens to experts on other ranks, and expert_parallel_degree is 1."
    elif config.model.quantizes_experts:
        reason = "does not align rows as quantized experts need (model.converters)."
    elif device.type != "cuda":
        reason = "needs GPUs; this machine trains on its CPU."
    elif backend == "deepep":
        reason = _why_not_deepep(config.training.mixed_precision_param)
    else:
        reason = _why_not_shared(config.parallelism, world_size)
    if reason:
        raise ConfigError([Fault(_KEY, reason, 'Use "standard".', backend)])


def _why_not_deepep(dtype: str | None) -> str | None:
    if dtype not in (None, "bfloat16"):
        return f"moves bfloat16 only, and training.mixed_precision_param is {dtype}."
    try:
        importlib.import_module("deep_ep")
    except ImportError as error:
        return f"is the library deep_ep, which cannot be imported here ({error})."
    return None


def _why_not_shared(config: Parallelism, world_size: int) -> str | None:
    span = config.expert_parallel_degree * config.expert_tensor_parallel_degree
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("NGPU") or world_size)
    if local % span:
        return f"works within a host: a layer's experts are on {span} ranks, and a host has {local}."
    if not _reach_each_other(min(local, torch.cuda.device_count())):
        return "needs GPUs that reach each other's memory; those of this host do not."
    return None


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
    mesh, group = meshes.experts["ep"], meshes.experts["ep"].get_group()
    match config.parallelism.expert_parallel_comm_backend:
        case "standard":
            make = partial(AllToAllTokenDispatcher, mesh)
        case "deepep":
            row_bytes = layers[0].router.gate.in_features * dtype.itemsize
            make = partial(DeepEPTokenDispatcher, open_buffer(group, row_bytes), mesh.size())
        case "symmetric_memory":
            parts = degrees.cp * (degrees.tp if own_tokens else slices)
            sizes = _sizes(layers[0], mesh.size(), -(-_most_tokens(config) // parts), config)
            exchange = PeerExchange(sizes, dtype, partial(SymmetricMemory, group))
            logger.info(_describe(exchange))
            make = partial(SymmetricMemoryTokenDispatcher, exchange)
    for layer in layers:
        local = layer.dispatcher
        shape = (local.num_experts, local.score_before_experts)
        if local.row_alignment == 1:
            layer.dispatcher = make(*shape, **place)
        else:  # of all-to-all: `check_comm_backend`
            layer.dispatcher = TorchAOTokenDispatcher(
                mesh,
                *shape,
                **place,
                row_alignment=local.row_alignment,
                exchange_in_float8=layer.exchange_in_float8,
            )


def _most_tokens(config: JobConfig) -> int:
    """Of whole sequences that go through the model at a time, in training or validation."""
    sections = [config.training, *([config.validation] if config.validation.enable else [])]
    parallelism = config.parallelism
    pipeline = parallelism.pipeline_parallel_degree > 1
    size = parallelism.pipeline_parallel_microbatch_size if pipeline else float("inf")
    return max(min(size, section.local_batch_size) * section.seq_len for section in sections)


def _sizes(layer: nn.Module, ep: int, num_tokens: int, config: JobConfig) -> Sizes:
    moe, dim = layer.config, layer.router.gate.in_features
    factor = config.parallelism.symmetric_memory_capacity_factor
    return Sizes(ep, num_tokens, moe.top_k, dim, moe.num_experts, factor)


def _describe(exchange: PeerExchange) -> str:
    sizes = exchange.sizes
    enough = "as many as can come" if sizes.num_rows == sizes.worst_case else "more end the run"
    return (
        f"experts share {exchange.num_bytes / 2**20:.0f} MiB of each GPU for {sizes.num_tokens} tokens "
        f"at a time; a rank has room for {sizes.num_rows} rows of a layer, {enough}"
    )
