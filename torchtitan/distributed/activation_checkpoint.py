"""Activation checkpointing: which of a block's activations are kept for backward.

The block's `forward` is replaced by a checkpointed call of itself, so parameter names stay as they
are, and a compiled block contains its checkpointing (by-op policies outside an inductor block would
save no matrix product).
"""

import functools
import types
from collections import defaultdict

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from torchtitan.config.schema import ActivationCheckpoint

_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
} | {torch._higher_order_ops.flex_attention}


def apply_activation_checkpoint(blocks: nn.ModuleDict, config: ActivationCheckpoint) -> None:
    """Checkpoint each block, or every n-th, in place, as `activation_checkpoint.mode` says."""
    options = {
        "preserve_rng_state": config.preserve_rng_state,
        "determinism_check": config.determinism_check,
        "early_stop": config.early_stop,
        "debug": config.debug,
    }
    every = 1
    if config.mode == "memory_budget":
        _set_memory_budget(config)
    if config.mode in ("none", "memory_budget"):
        return
    if config.mode == "selective" and config.selective_ac_option == "op":
        shapes = _recomputed_shapes(blocks, config.per_op_sac_force_recompute_mm_shapes_by_fqns)
        options["context_fn"] = functools.partial(_save_by_op, shapes)
    elif config.mode == "selective":
        every = int(config.selective_ac_option)
    for block in list(blocks.values())[::every]:
        _checkpoint(block, options)


def _checkpoint(block: nn.Module, options: dict) -> None:
    block.checkpoint_options = options
    block.forward = types.MethodType(_checkpointed_forward, block)


def _checkpointed_forward(self: nn.Module, *args):
    # One function for all blocks, bound as a method: compiled blocks share their graph.
    forward = functools.partial(type(self).forward, self)
    return checkpoint(forward, *args, use_reentrant=False, **self.checkpoint_options)


def _save_by_op(recomputed_shapes: frozenset[torch.Size]):
    """Keep attention's outputs and every second matrix product; recompute the rest.

    Products with a weight of one of `recomputed_shapes`, (in, out), are always recomputed.
    """
    num_products: dict[bool, int] = defaultdict(int)

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        if op in _ATTENTION:
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


def _set_memory_budget(config: ActivationCheckpoint) -> None:
    # No public name for it as of torch 2.11 and 2.13; only compiled blocks look at it.
    torch._functorch.config.activation_memory_budget = config.memory_budget
    torch._functorch.config.visualize_memory_budget_pareto = (
        config.visualize_memory_budget_pareto
    )
