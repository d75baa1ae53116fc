"""Spreads a model over a mesh: one order of steps, for every model."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config.schema import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import Precision, apply_fsdp


def parallelize(
    model: nn.Module, mesh: DeviceMesh | None, precision: Precision, config: JobConfig
) -> None:
    """Checkpoint, compile and shard a model on the meta device, in place.

    Without a mesh (one rank outside any process group) nothing is sharded.
    """
    model.to(precision.store)
    apply_activation_checkpoint(model.layers, config.activation_checkpoint)
    apply_compile(model, config.compile)
    if mesh is not None:
        reshard = config.parallelism.fsdp_reshard_after_forward
        apply_fsdp(model, mesh, precision, reshard, config.training.enable_cpu_offload)
