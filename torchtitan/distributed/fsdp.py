"""Data parallelism through FSDP2: sharded, replicated, or both; and the precision policy with it.

One precision policy holds at any world size: a single rank, which has nothing to shard, computes with
copies of its weights. Every reduction is a SUM: the loss is already divided by the tokens of
the whole global batch, so there is no averaging factor that could be wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from torchtitan.config.schema import JobConfig
from torchtitan.distributed.comm import has_fast_bfloat16
from torchtitan.distributed.local_parts import local_part
from torchtitan.distributed.mesh import Meshes
from torchtitan.distributed.parameter_views import use_cast_parameters
from torchtitan.sharding import EXPERT_HIDDEN_DIM


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run: of the stored weights, of the computation, of the gradient reduction."""

    store: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype

    @classmethod
    def resolve(cls, config: JobConfig, device: torch.device) -> "Precision":
        """What the config asks for; unset, the compute dtype is bf16 where the device is fast at it."""
        training = config.training
        compute = training.mixed_precision_param
        if compute is None:
            compute = "bfloat16" if has_fast_bfloat16(device) else "float32"
        return cls(
            getattr(torch, training.dtype),
            getattr(torch, compute),
            getattr(torch, training.mixed_precision_reduce),
        )


def apply_fsdp(
    model: nn.Module,
    units: Sequence[Sequence[str]],
    experts: Sequence[str],
    meshes: Meshes,
    precision: Precision,
    reshard: str,
    offload: bool,
) -> None:
    """Shard the units (module names) over the data-parallel ranks of `meshes`, in place.

    `experts` are the modules that hold experts; where these are spread over ranks of their own, they
    are sharded by themselves. `reshard` is parallelism.fsdp_reshard_after_forward; by default all but
    the last unit, which backward needs at once, free their gathered weights after forward. Stages of
    a pipeline keep them: the next microbatch needs them, and a backward that is split loses gradients.
    """
    dense = meshes.dense
    pipelined = dense["pp"].size() > 1
    compute_unsharded = partial(_compute_unsharded, model, precision=precision, pipelined=pipelined)
    if dense.size() == dense["pp"].size() and not offload:
        compute_unsharded([name for unit in units for name in unit])
        return
    # Casting inputs would round the RoPE table; activations follow the embedding's dtype.
    casts = MixedPrecisionPolicy(precision.compute, precision.reduce, cast_forward_inputs=False)
    pin = dense.device_type == "cuda"
    offloads = CPUOffloadPolicy(pin_memory=pin) if offload else OffloadPolicy()
    mesh = _data_parallel(dense, "fsdp")
    of_experts = mesh if meshes.experts is None else _data_parallel(meshes.experts, "efsdp")
    weights = {w for name in experts for w in model.get_submodule(name).parameters()}
    experts_unsharded = not offload and _are_unsharded(of_experts, meshes)
    if experts_unsharded:
        compute_unsharded(experts, rest=False)
    ignored = weights if experts_unsharded else set()
    shard = partial(fully_shard, mp_policy=casts, offload_policy=offloads, ignored_params=ignored)
    placement = partial(_expert_placement, weights, of_experts.size(-1))
    for unit in units:
        frees = reshard == "always"
        frees |= reshard == "default" and not pipelined and unit is not units[-1]
        if of_experts is not mesh and not experts_unsharded:
            for name in _inside(unit, experts):
                module = model.get_submodule(name)
                shard(module, mesh=of_experts, reshard_after_forward=frees, shard_placement_fn=placement)
        modules = [model.get_submodule(name) for name in unit]
        shard(modules, mesh=mesh, reshard_after_forward=frees, shard_placement_fn=placement)
    shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def _data_parallel(mesh: DeviceMesh, shard_axis: str) -> DeviceMesh:
    replicated = mesh["dp_replicate"].size() > 1
    return mesh["dp_replicate", shard_axis] if replicated else mesh[shard_axis]


def _inside(unit: Sequence[str], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(name.startswith(f"{part}.") for part in unit)]


def _are_unsharded(of_experts: DeviceMesh, meshes: Meshes) -> bool:
    """Whether each expert is on one rank only, with all of its gradient: FSDP has nothing to do."""
    experts = meshes.experts
    return experts is not None and of_experts.size() == experts["etp"].size() == 1


def _compute_unsharded(
    model: nn.Module, names: Sequence[str], precision: Precision, pipelined: bool, rest: bool = True
) -> None:
    """Have modules of `model` whose weights no other rank shares compute in the run's precision.

    All of it with the `rest`: what is not within `names`, as a tied weight, is used in several places.
    There copies would add gradients up in their own dtype, and in a pipeline its split backward looks for
    gradients at the parameters themselves: neither keeps any.
    """
    if precision.compute == precision.store:
        return
    inside = {module: None for name in names for module in model.get_submodule(name).modules()}
    use_cast_parameters(model, inside, precision.compute, kept=not pipelined)
    if rest:
        others = [module for module in model.modules() if module not in inside]
        use_cast_parameters(model, others, precision.compute, kept=False)


def _expert_placement(
    weights: set[nn.Parameter], num_ranks: int, weight: nn.Parameter
) -> Shard | None:
    """Experts are sharded by expert; where that leaves ranks without any, along their hidden width."""
    if weight not in weights:
        return None
    local = local_part(weight)
    hidden = local.shape[EXPERT_HIDDEN_DIM:][:1]  # the output's bias has none
    along_hidden = len(local) < num_ranks and hidden and hidden[0] % num_ranks == 0
    return Shard(EXPERT_HIDDEN_DIM if along_hidden else 0)


def sync_gradients(model: nn.Module, last_microbatch: bool, each_microbatch: bool) -> None:
    """Say, before a microbatch's forward, whether its backward reduces gradients over ranks.

    Gradients are reduced with the last microbatch; with `each_microbatch` shards are reduced every
    time, which keeps no unsharded gradients, and only the replicas wait for the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last_microbatch or each_microbatch)
        model.set_requires_all_reduce(last_microbatch)
        # Not set_is_last_backward: FSDP would keep its prefetching order from one microbatch to the
        # next, and gather the last unit once more at the end of each backward but the first.


def fill_parameters(
    model: nn.Module,
    device: torch.device,
    draw: Callable[[str, torch.Size, torch.Tensor], torch.Tensor],
) -> None:
    """Move a sharded model from the meta device to `device`, and give each rank its part of the weights.

    draw(name, shape, rows) returns those rows of the whole logical tensor; all ranks draw the same
    values, so nothing is communicated. With CPU offload `device` is the CPU, whatever device the mesh
    is on.
    """
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = torch.arange(parameter.shape[0])
            if not isinstance(parameter, DTensor):
                parameter.copy_(draw(name, parameter.shape, rows))
                continue
            mesh, whole = parameter.device_mesh, Replicate()
            # Not is_shard(0): FSDP's strided shard of a tensor-parallel weight is no Shard to it.
            on_rows = [getattr(placement, "dim", None) == 0 for placement in parameter.placements]
            of_rows = [p if on else whole for p, on in zip(parameter.placements, on_rows)]
            of_rest = [whole if on else p for p, on in zip(parameter.placements, on_rows)]
            part = draw(name, parameter.shape, _part_of(rows, mesh, of_rows))
            parameter.to_local().copy_(_part_of(part, mesh, of_rest))


def _part_of(whole: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]) -> torch.Tensor:
    """What this rank holds of a tensor that all ranks have."""
    if all(placement.is_replicate() for placement in placements):
        return whole
    whole = whole.to(mesh.device_type)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
