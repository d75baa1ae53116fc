"""Loss on held-out data, each token weighted the same whatever the layout or batch."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from torchtitan.data.batch import Batch


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Batch], device: torch.device
) -> tuple[float, int]:
    """Mean loss over the valid tokens of all ranks' batches, and the number of those tokens.

    Collective: all ranks bring as many batches, empty ones where their part of the data has ended,
    and stop together at the first that is empty on all of them.
    """
    loss = torch.zeros((), device=device)
    num_tokens = 0
    model.eval()
    for batch in batches:
        valid = torch.tensor(batch.num_valid_tokens)
        dist.all_reduce(valid)
        if not valid:
            break
        tokens, labels = (x.to(device, non_blocking=True) for x in (batch.tokens, batch.labels))
        loss += model(tokens, labels, model.documents(batch.document_lengths, device))
        num_tokens += int(valid)
    model.train()
    dist.all_reduce(loss)
    return loss.item() / max(num_tokens, 1), num_tokens
