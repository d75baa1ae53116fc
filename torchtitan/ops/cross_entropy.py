"""The training loss from hidden states: product with the output weight and cross-entropy.

T tokens, D model, V vocabulary. Labels of -100, PyTorch's default, count nothing.
"""

import torch
import torch.nn.functional as F

_CHUNK_BYTES = 2**31
"""Of logits at a time: large enough for products at full speed, small beside weights and activations."""

IGNORED = -100


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum over the valid labels of the cross-entropy of softmax(hidden @ weight.T), fp32 scalar.

    hidden (..., D) and weight (V, D) in the compute dtype, plain or DTensors; labels (...) int64. No
    valid label at all gives zero. The caller divides by the number of valid labels in the whole global
    batch, which no single call can know. All logits exist at a time, and are kept for backward.
    """
    logits = F.linear(hidden.flatten(0, -2), weight)
    return F.cross_entropy(logits.float(), labels.flatten(), reduction="sum")


def chunked_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """As `linear_cross_entropy`, for plain tensors; logits exist for some tokens at a time.

    Forward computes the gradients, too: a chunk's logits become their own gradient in place. So no
    logits are kept, and none is computed twice.
    """
    return _ChunkedLinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), torch.is_grad_enabled()
    )


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, differentiates):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        size = max(1, _CHUNK_BYTES // (len(weight) * weight.itemsize))
        parts = list(zip(hidden.split(size), labels.split(size), strict=True))
        for_hidden, for_weight = (differentiates and needed for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_weight = None
        losses = []
        for index, (states, of_states) in enumerate(parts):
            logits = states @ weight.t()
            losses.append(cross_entropy_(logits, of_states))
            if for_hidden:
                d_hidden[index * size : index * size + len(states)] = logits @ weight
            if for_weight:
                d_weight = _accumulate(d_weight, logits.t(), states, wide, rounds=len(parts) == 1)
            del logits  # before the next ones
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx, grad):
        scaled = (None if d is None else (d * grad).to(ctx.dtype) for d in ctx.saved_tensors)
        return *scaled, None, None


def _accumulate(
    total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, wide: torch.dtype, rounds: bool
) -> torch.Tensor:
    """total + a @ b: in `wide`, or just the product where there is only one."""
    if rounds:
        return a @ b
    if total is None:
        total = torch.zeros(len(a), b.shape[1], dtype=wide, device=a.device)
    if a.dtype == wide:
        return total.addmm_(a, b)
    return total.add_(a @ b) if not a.is_cuda else torch.addmm(total, a, b, out_dtype=wide)


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each token's cross-entropy (T,), fp32 (fp64 for fp64), 0 where its label is ignored.

    logits (T, V) become their gradient, softmax minus one at the label, in place; labels (T,) int64.
    """
    if logits.is_cuda and logits.dtype != torch.float64:
        from torchtitan.ops import triton_loss  # PyTorch for CPUs comes without Triton

        return triton_loss.cross_entropy_(logits, labels)
    valid = (labels != IGNORED).unsqueeze(1)
    index = labels.unsqueeze(1).where(valid, 0)
    log_softmax = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
    losses = -log_softmax.gather(1, index).where(valid, 0).squeeze(1)
    gradient = log_softmax.exp_()
    gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
    logits.copy_(gradient.where(valid, 0))
    return losses
