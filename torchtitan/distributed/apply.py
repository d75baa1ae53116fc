"""Spreads a model over a mesh: one order of steps, for every model."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config.schema import JobConfig
from torchtitan.distributed.activation_checkpoint import (
    checkpoint_blocks,
    checkpoint_by_op,
    set_memory_budget,
)
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import Precision, apply_fsdp
from torchtitan.distributed.plan import match
from torchtitan.distributed.styles import apply_styles


def parallelize(
    model: nn.Module, mesh: DeviceMesh, precision: Precision, config: JobConfig
) -> None:
    """Split, checkpoint, compile and shard a model on the meta device, in place."""
    plan = model.parallel_plan()
    styles = match(plan, model)
    model.to(precision.store)
    if mesh["tp"].size() > 1:
        sequence_parallel = config.parallelism.enable_sequence_parallel
        apply_styles(model, styles, mesh["tp"], sequence_parallel)
    set_memory_budget(config.activation_checkpoint)
    checkpoint_by_op(model.layers, config.activation_checkpoint)
    apply_compile(model, config.compile)
    checkpoint_blocks(model.layers, config.activation_checkpoint)
    reshard = config.parallelism.fsdp_reshard_after_forward
    offload = config.training.enable_cpu_offload
    apply_fsdp(model, plan.fsdp_units, mesh, precision, reshard, offload)
