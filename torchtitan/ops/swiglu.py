"""SwiGLU times a score for each row, and its gradient: the passes between the experts' products.

R rows, F hidden width. Arithmetic is in fp32 (fp64 for fp64), each result rounded once. Where num_rows,
() int64, is given, what results are after so many rows is undefined: kernels leave them out.
"""

from typing import NamedTuple

import torch

from torchtitan.ops.wide import widened


class Gating(NamedTuple):
    """gate * sigmoid(alpha * gate) * (up + up_offset): SwiGLU, or with 1.702, 7 and 1 gpt-oss's."""

    alpha: float = 1.0
    limit: float = float("inf")
    """Before all else, gate is cut off above it, and up on both sides."""
    up_offset: float = 0.0


def swiglu(
    z: torch.Tensor,
    scores: torch.Tensor | None,
    gating: Gating,
    num_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gated activation of z = (gate, up) (R, 2F), times scores (R,): (R, F) in z's dtype."""
    gate, up = widened(z).chunk(2, dim=1)
    gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
    act = gate * torch.sigmoid(gating.alpha * gate) * (up + gating.up_offset)
    return (act if scores is None else act * scores.unsqueeze(1)).to(z.dtype)


def swiglu_backward(
    d_act: torch.Tensor,
    z: torch.Tensor,
    scores: torch.Tensor | None,
    gating: Gating,
    num_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """From the gradient d_act (R, F) of `swiglu`'s result: that result, d_z and d_scores (R,)."""
    gate, up = widened(z).chunk(2, dim=1)
    inside = gate <= gating.limit, up.abs() <= gating.limit
    gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
    sigmoid, up = torch.sigmoid(gating.alpha * gate), up + gating.up_offset
    glu = gate * sigmoid
    act, gradient, d_scores = glu * up, widened(d_act), None
    if scores is not None:
        d_scores = (gradient * act).sum(1).to(scores.dtype)
        act, gradient = act * scores.unsqueeze(1), gradient * scores.unsqueeze(1)
    d_gate = gradient * up * (sigmoid + gating.alpha * glu * (1 - sigmoid))
    d_z = torch.cat([d_gate.where(inside[0], 0), (gradient * glu).where(inside[1], 0)], dim=1)
    return act.to(z.dtype), d_z.to(z.dtype), d_scores
