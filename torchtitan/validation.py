"""Loss on held-out data, each token weighted the same whatever the layout or batch."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from torchtitan.data.batch import Batch
from torchtitan.distributed.mesh import Degrees
from torchtitan.model_parts import ModelParts


@torch.no_grad()
def validate(
    model: ModelParts, batches: Iterable[Batch], degrees: Degrees
) -> tuple[float, int]:
    """Mean loss over the valid tokens of all ranks' batches, and the number of those tokens.

    Collective: all ranks bring as many batches, empty ones where their part of the data has ended,
    and stop together at the first that is empty on all of them.
    """
    loss = torch.zeros((), device=model.device)
    num_tokens = 0
    model.train(False)
    for batch in batches:
        valid = torch.tensor(batch.num_valid_tokens)
        dist.all_reduce(valid)
        if not valid:
            break
        loss += model.loss(batch)
        num_tokens += int(valid) // degrees.token_copies
    model.train()
    dist.all_reduce(loss)
    return loss.item() / degrees.tp / max(num_tokens, 1), num_tokens
