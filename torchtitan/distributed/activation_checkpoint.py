"""Activation checkpointing: which of a block's activations are kept for backward.

The block's `forward` is replaced by a checkpointed call of itself, so parameter names stay as they
are. A policy by operation goes inside a compiled block: from outside it would see the compiler's
kernels and save no matrix product. Whole blocks are checkpointed from outside: inside, torch 2.13
fails where a recomputed block holds DTensors ("expected ... Tensors, got ... DeviceMesh").
"""

import functools
import logging
import types
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.ops import experts as _experts, top_k as _top_k  # noqa: F401 - define operators
from torchtitan.routing_decisions import decide_once

_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
} | {torch._higher_order_ops.flex_attention}


_ROUTING = {
    torch.ops.torchtitan.keep.default,
    torch.ops.torchtitan.record_load.default,
    torch.ops.torchtitan.top_k.default,
}
"""Routing is decided and counted once: a recomputation gets the same results."""
_LARGEST = {torch.ops.aten.max.default, torch.ops.aten.amax.default}
"""What low-precision products scale by: a number a tensor or a row, for a pass over all of it."""

_EXPERTS = {torch.ops.torchtitan.grouped_experts.default}
"""Three of a layer's largest products; what they keep is small beside (ops/experts.py)."""

_KEPT = _ATTENTION | _ROUTING | _LARGEST | _EXPERTS


def checkpoint_by_op(
    model: nn.Module, exchanging: Sequence[str], config: ActivationCheckpoint
) -> None:
    """With mode selective, option "op": keep what is slow to recompute. Before compilation.

    In the blocks of `exchanging` (names of MoE layers that send rows to other ranks) attention alone is
    checkpointed: a policy by operation must see the same operations again, and experts' FSDP hooks do
    others in a recomputation. What experts received and computed is kept anyway.
    """
    if config.mode != "selective" or config.selective_ac_option != "op":
        return
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_no_advice)
    options = _options(config)
    shapes = _recomputed_shapes(model.layers, config.per_op_sac_force_recompute_mm_shapes_by_fqns)
    by_op = options | {"context_fn": functools.partial(_save_by_op, shapes)}
    for name, block in model.layers.items():
        exchanges = any(layer.startswith(f"layers.{name}.") for layer in exchanging)
        _checkpoint(block.attention if exchanges else block, by_op)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Torch advises every run of compiled blocks (2.13) not to work in place: ours do not."""
    return "context_fn is passed to torch.utils.checkpoint" not in str(record.msg)


def checkpoint_blocks(blocks: nn.ModuleDict, config: ActivationCheckpoint) -> None:
    """With mode full every block, with selective every n-th, keeps its inputs. After compilation."""
    every = 0
    if config.mode == "full":
        every = 1
    elif config.mode == "selective" and config.selective_ac_option != "op":
        every = int(config.selective_ac_option)
    options = _options(config) | {"context_fn": decide_once}
    for block in list(blocks.values())[::every] if every else ():
        _checkpoint(block, options)


def set_memory_budget(config: ActivationCheckpoint) -> None:
    """With mode memory_budget: tell the compiler which share of activations it may keep."""
    if config.mode == "memory_budget":
        # No public name for it as of torch 2.11 and 2.13; only compiled blocks look at it.
        functorch = torch._functorch.config
        functorch.activation_memory_budget = config.memory_budget
        functorch.visualize_memory_budget_pareto = config.visualize_memory_budget_pareto
        # A budget weighs all that a graph is given, and fails over the meshes of tensor parallelism,
        # which have no memory to speak of. Torch 2.11 has no such check and no such name.
        if hasattr(functorch, "unsafe_treat_script_objects_as_zero_size"):
            functorch.unsafe_treat_script_objects_as_zero_size = True


def _options(config: ActivationCheckpoint) -> dict[str, Any]:
    return {
        "preserve_rng_state": config.preserve_rng_state,
        "determinism_check": config.determinism_check,
        "early_stop": config.early_stop,
        "debug": config.debug,
    }


def _checkpoint(module: nn.Module, options: dict[str, Any]) -> None:
    module.checkpoint_options = options
    module.unchecked = module.forward
    module.forward = types.MethodType(_checkpointed, module)


def _checkpointed(self: nn.Module, *args):
    # One function for all blocks, bound as a method: compiled blocks share their graph.
    return checkpoint(self.unchecked, *args, use_reentrant=False, **self.checkpoint_options)


def _save_by_op(recomputed_shapes: frozenset[torch.Size]):
    """Keep attention's outputs, routing, experts, scales and every second matrix product; recompute the rest.

    Products with a weight of one of `recomputed_shapes`, (in, out), are always recomputed.
    """
    num_products: dict[bool, int] = defaultdict(int)

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        if op in _KEPT:
            return CheckpointPolicy.MUST_SAVE
        if op is torch.ops.aten.mm.default and args[1].shape not in recomputed_shapes:
            num_products[ctx.is_recompute] += 1
            if num_products[ctx.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _recomputed_shapes(blocks: nn.Module, patterns: list[str]) -> frozenset[torch.Size]:
    return frozenset(
        torch.Size(reversed(module.weight.shape))
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and any(pattern in name for pattern in patterns)
    )
