"""The training loss, computed from hidden states and the output weight behind one interface."""

import torch
import torch.nn.functional as F

def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum over the valid labels of the cross-entropy of softmax(hidden @ weight.T), fp32 scalar.

    hidden (..., D) and weight (V, D) in the compute dtype, labels (...) int64; a label of -100,
    PyTorch's default, counts nothing, and no valid label at all gives zero. The caller divides by
    the number of valid labels in the whole global batch, which no single call can know.
    """
    logits = F.linear(hidden.flatten(0, -2), weight)
    return F.cross_entropy(logits.float(), labels.flatten(), reduction="sum")
