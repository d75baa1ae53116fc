"""Spreads the MoE layers of a model: experts over ranks, and the dispatcher that follows."""

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from torchtitan.config.schema import JobConfig
from torchtitan.distributed.expert_parallel.dispatchers import set_dispatchers
from torchtitan.distributed.mesh import Degrees, Meshes
from torchtitan.distributed.parameter_views import use_local_parameters
from torchtitan.sharding import EXPERT_HIDDEN_DIM, Style


def apply_expert_parallel(
    model: nn.Module,
    styles: dict[str, Style],
    degrees: Degrees,
    meshes: Meshes,
    config: JobConfig,
    dtype: torch.dtype,
) -> None:
    """Spread experts' weights over ep and etp ranks and set the layers' dispatchers, in place.

    Layers compute in `dtype`.
    """
    mesh, placements = _placements(degrees, meshes)
    copies = degrees.routing_copies(config.parallelism.enable_sequence_parallel)
    axes = [meshes.cp] if degrees.cp > 1 else []
    axes += [meshes.dense["tp"]] if copies < degrees.tp else []
    layers = []
    for name, style in styles.items():
        module = model.get_submodule(name)
        if style is Style.EXPERTS and mesh.size() > 1:
            _distribute(module, mesh, placements)
        elif style is Style.REGION:
            layers.append(module)
            module.load_copies = copies
            if axes:
                module.sequence_parts = math.prod(axis.size() for axis in axes)
                module.sum_counts = partial(_sum_over, [axis.get_group() for axis in axes])
    if degrees.ep > 1:
        set_dispatchers(layers, degrees, meshes, config, dtype)


def _placements(degrees: Degrees, meshes: Meshes) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    if meshes.experts is None:
        return meshes.dense["tp"], (Shard(EXPERT_HIDDEN_DIM),)
    if degrees.etp == 1:
        return meshes.experts["ep"], (Shard(0),)
    return meshes.experts["ep", "etp"], (Shard(0), Shard(EXPERT_HIDDEN_DIM))


def _distribute(experts: nn.Module, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> None:
    of_grads, terms = {}, {}
    for name, weight in dict(experts.named_parameters(recurse=False)).items():
        where = of_grads[name] = placements
        if weight.ndim == EXPERT_HIDDEN_DIM and Shard(EXPERT_HIDDEN_DIM) in placements:
            # The output's bias: ranks with parts of an expert add up their outputs.
            where, of_grads[name] = (*placements[:-1], Replicate()), (*placements[:-1], Partial())
            terms[name] = mesh.size(-1)
        weight = distribute_tensor(weight, mesh, where, src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(weight))
    use_local_parameters(experts, of_grads, terms)


@torch.compiler.disable
def _sum_over(groups: list[dist.ProcessGroup], counts: torch.Tensor) -> torch.Tensor:
    for group in groups:
        dist.all_reduce(counts, group=group)
    return counts
