"""Moves parts of sequences between the ranks that share them; gradients go the other way.

Operators of our own: torch 2.11 and 2.13 have collectives with gradients under different private names.
"""

import torch
import torch.distributed as dist

from torchtitan.distributed.comm import group_named

# Torch 2.13 renamed both, and warns of the names that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@torch.library.custom_op("torchtitan::gather_tokens", mutates_args=())
def gather_tokens(x: torch.Tensor, num_ranks: int, group: str) -> torch.Tensor:
    """x (n, ...) of every rank, by rank: (P * n, ...). Gradients are summed over ranks."""
    whole = x.new_empty(num_ranks * len(x), *x.shape[1:])
    _all_gather(whole, x.contiguous(), group=group_named(group))
    return whole


@gather_tokens.register_fake
def _(x: torch.Tensor, num_ranks: int, group: str) -> torch.Tensor:
    return x.new_empty(num_ranks * len(x), *x.shape[1:])


@torch.library.custom_op("torchtitan::sum_tokens", mutates_args=())
def sum_tokens(whole: torch.Tensor, num_ranks: int, group: str) -> torch.Tensor:
    """The sum over ranks of this rank's part of whole (P * n, ...): (n, ...)."""
    own = whole.new_empty(len(whole) // num_ranks, *whole.shape[1:])
    _reduce_scatter(own, whole.contiguous(), group=group_named(group))
    return own


@sum_tokens.register_fake
def _(whole: torch.Tensor, num_ranks: int, group: str) -> torch.Tensor:
    return whole.new_empty(len(whole) // num_ranks, *whole.shape[1:])


@torch.library.custom_op("torchtitan::exchange_tokens", mutates_args=())
def exchange_tokens(
    x: torch.Tensor, num_sent: list[int], num_received: list[int], group: str
) -> torch.Tensor:
    """x (N, ...), the first num_sent[0] rows for rank 0 and so on, to what ranks have for this one."""
    received = x.new_empty(sum(num_received), *x.shape[1:])
    dist.all_to_all_single(
        received, x.contiguous(), num_received, num_sent, group=group_named(group)
    )
    return received


@exchange_tokens.register_fake
def _(
    x: torch.Tensor, num_sent: list[int], num_received: list[int], group: str
) -> torch.Tensor:
    return x.new_empty(sum(num_received), *x.shape[1:])


def _keep_sizes(ctx, inputs, output) -> None:
    ctx.sizes = inputs[1:]


def _gather_backward(ctx, grad: torch.Tensor):
    return sum_tokens(grad, *ctx.sizes), None, None


def _exchange_backward(ctx, grad: torch.Tensor):
    num_sent, num_received, group = ctx.sizes
    return exchange_tokens(grad, num_received, num_sent, group), None, None, None


gather_tokens.register_autograd(_gather_backward, setup_context=_keep_sizes)
exchange_tokens.register_autograd(_exchange_backward, setup_context=_keep_sizes)
