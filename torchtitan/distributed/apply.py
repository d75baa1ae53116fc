"""Spreads a model over a mesh: one order of steps, for every model."""

import torch.distributed as dist
from torch import nn

from torchtitan.config.schema import JobConfig
from torchtitan.distributed.activation_checkpoint import (
    checkpoint_blocks,
    checkpoint_by_op,
    set_memory_budget,
)
from torchtitan.distributed.async_tensor_parallel import enable_async_tensor_parallel
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_context_parallel, sequence_part
from torchtitan.distributed.expert_parallel.apply import apply_expert_parallel
from torchtitan.distributed.fsdp import Precision, apply_fsdp
from torchtitan.distributed.mesh import Degrees, Meshes
from torchtitan.distributed.plan import styles_of
from torchtitan.distributed.styles import apply_styles
from torchtitan.sharding import Style


def parallelize(
    model: nn.Module, degrees: Degrees, meshes: Meshes, precision: Precision, config: JobConfig
) -> None:
    """Split, checkpoint, compile and shard a model, or a stage of it, on the meta device, in place."""
    plan = model.parallel_plan()
    styles = styles_of(plan, model)
    model.to(precision.store)
    sequence_parallel = config.parallelism.enable_sequence_parallel
    if degrees.tp > 1:
        split_regions = not degrees.route_own_tokens(sequence_parallel)
        apply_styles(model, styles, meshes.dense["tp"], sequence_parallel, split_regions)
        if config.parallelism.enable_async_tensor_parallel:
            enable_async_tensor_parallel(meshes.dense["tp"])
    if max(degrees.tp, degrees.ep, degrees.cp) > 1:
        apply_expert_parallel(model, styles, degrees, meshes, config, precision.compute)
    if degrees.cp > 1:
        part = sequence_part(config.parallelism, degrees, dist.get_rank())
        apply_context_parallel(model, part, meshes.cp, config.parallelism)
    set_memory_budget(config.activation_checkpoint)
    exchanging = _named(styles, Style.REGION) if degrees.ep > 1 else []
    checkpoint_by_op(model, exchanging, config.activation_checkpoint)
    place = f"rank {dist.get_rank()} of {degrees}"
    apply_compile(model, exchanging, config.compile, place)
    checkpoint_blocks(model.layers, config.activation_checkpoint)
    reshard = config.parallelism.fsdp_reshard_after_forward
    offload = config.training.enable_cpu_offload
    experts = _named(styles, Style.EXPERTS)
    apply_fsdp(model, plan.fsdp_units, experts, meshes, precision, reshard, offload)


def _named(styles: dict[str, Style], wanted: Style) -> list[str]:
    return [name for name, style in styles.items() if style is wanted]
