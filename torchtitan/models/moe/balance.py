"""Losses that keep routers balanced. They change gradients only; the reported loss is without them.

T tokens of B sequences, E experts, K top-k. A loss is a mean over the whole global batch: every
microbatch adds its share, so that neither microbatches nor ranks change it.
"""

from collections.abc import Callable

import torch

from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.router import Routing, score

SumCounts = Callable[[torch.Tensor], torch.Tensor]
"""Adds up counts (B, E) over the ranks that hold parts of the same sequences."""


def balance_loss(
    config: MoEConfig,
    choice: Routing,
    num_sequences: int,
    sequence_parts: int,
    sum_counts: SumCounts,
    previous_load: torch.Tensor | None,
) -> torch.Tensor:
    """The configured losses of B = num_sequences sequences, summed over them: a scalar, fp32.

    Each rank of `sequence_parts` holds as many consecutive tokens of every sequence.
    previous_load (E,): tokens by expert of the last optimizer step, all zero before the first.
    """
    scores, ids = score(config, choice.logits), choice.selected_experts_indices
    num_experts = scores.shape[1]
    length = len(scores) // num_sequences * sequence_parts
    share = scores / (scores.sum(1, keepdim=True) + 1e-20)
    total = scores.new_zeros(())
    if config.router_z_coeff:  # arXiv 2202.08906, eq. 5
        squares = choice.logits.logsumexp(1).square().sum()
        total = total + config.router_z_coeff / length * squares
    if config.global_balance_coeff:  # arXiv 2101.03961, eq. 4, with the load of the last step
        load = previous_load / previous_load.sum().clamp(min=1) * num_experts
        total = total + config.global_balance_coeff / length * (share * load).sum()
    if config.sequence_balance_coeff:  # arXiv 2412.19437, eq. 17 to 20
        chosen = ids.view(num_sequences, -1)
        counts = share.new_zeros(num_sequences, num_experts)
        counts = sum_counts(counts.scatter_add(1, chosen, torch.ones_like(chosen, dtype=share.dtype)))
        load = counts * num_experts / (config.top_k * length)
        mean_share = share.unflatten(0, (num_sequences, -1)).sum(1) / length
        total = total + config.sequence_balance_coeff * (load * mean_share).sum()
    return total


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def with_loss(x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """x, whose backward also goes through `loss` (a scalar) as if that were added to the run's."""
    return _WithLoss.apply(x, loss)
