"""Data parallelism through FSDP2: sharded, replicated, or both; and the precision policy with it.

One policy holds at any world size, so a model that computes in another dtype than its weights is
wrapped on a single rank too. Every reduction is a SUM: the loss is already divided by the tokens of
the whole global batch, so there is no averaging factor that could be wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from torchtitan.config.schema import JobConfig
from torchtitan.distributed.comm import has_fast_bfloat16


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
    mesh: DeviceMesh,
    precision: Precision,
    reshard: str,
    offload: bool,
) -> None:
    """Shard the units (module names) over dp_shard and replicate them over dp_replicate, in place.

    `reshard` is parallelism.fsdp_reshard_after_forward; by default all but the last unit, which
    backward needs at once, free their gathered weights after forward.
    """
    if mesh.size() == 1 and precision.compute == precision.store and not offload:
        return
    replicated = mesh["dp_replicate"].size() > 1
    mesh = mesh["dp_replicate", "dp_shard"] if replicated else mesh["dp_shard"]
    shared = {
        "mesh": mesh,
        # Casting inputs would round the RoPE table; activations follow the embedding's dtype.
        "mp_policy": MixedPrecisionPolicy(
            precision.compute, precision.reduce, cast_forward_inputs=False
        ),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
        ),
    }
    for unit in units:
        last = unit is units[-1]
        modules = [model.get_submodule(name) for name in unit]
        reshard_after_forward = reshard == "always" or (reshard == "default" and not last)
        fully_shard(modules, reshard_after_forward=reshard_after_forward, **shared)
    fully_shard(model, reshard_after_forward=False, **shared)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def sync_gradients(model: nn.Module, last_microbatch: bool, each_microbatch: bool) -> None:
    """Say, before a microbatch's forward, whether its backward reduces gradients over ranks.

    Gradients are reduced with the last microbatch; with `each_microbatch` shards are reduced every
    time, which keeps no unsharded gradients, and only the replicas wait for the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last_microbatch or each_microbatch)
        model.set_requires_all_reduce(last_microbatch)
        model.set_is_last_backward(last_microbatch)


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
            part = draw(name, parameter.shape, _local_part(rows, mesh, of_rows))
            parameter.to_local().copy_(_local_part(part, mesh, of_rest))


def _local_part(
    whole: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]
) -> torch.Tensor:
    """What this rank holds of a tensor that all ranks have."""
    if all(placement.is_replicate() for placement in placements):
        return whole
    whole = whole.to(mesh.device_type)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
