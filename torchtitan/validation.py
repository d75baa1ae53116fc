"""Loss on held-out data, each token weighted the same whatever the layout or batch."""

import torch
import torch.distributed as dist
from torch import nn

from torchtitan.data.loader import Loader


@torch.no_grad()
def validate(
    model: nn.Module, loader: Loader, num_batches: int, device: torch.device
) -> tuple[float, int]:
    """Mean loss over the valid tokens of `num_batches` global batches, and how many tokens that is.

    -1 is all of the data, once. Collective: ranks whose part of the data ends early go on with empty
    batches until all are through.
    """
    loss = torch.zeros((), device=device)
    num_tokens = 0
    model.eval()
    loader.restart()
    while num_batches != 0:
        batch = next(loader)
        valid = torch.tensor(batch.num_valid_tokens)
        dist.all_reduce(valid)
        if not valid:
            break
        tokens, labels = (x.to(device, non_blocking=True) for x in (batch.tokens, batch.labels))
        loss += model(tokens, labels, model.documents(batch.document_lengths, device))
        num_tokens += int(valid)
        num_batches -= 1
    model.train()
    dist.all_reduce(loss)
    return loss.item() / max(num_tokens, 1), num_tokens
