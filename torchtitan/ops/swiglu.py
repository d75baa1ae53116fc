"""SwiGLU times a score for each row, and its gradient: the passes between the experts' products.

R rows, F hidden width. Arithmetic is in fp32 (fp64 for fp64), each result rounded once.
"""

import torch
import torch.nn.functional as F


def swiglu(z: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up * score of z = (gate, up) (R, 2F) and scores (R,): (R, F) in z's dtype."""
    gate, up = _wide(z).chunk(2, dim=1)
    act = F.silu(gate) * up
    return (act if scores is None else act * scores.unsqueeze(1)).to(z.dtype)


def swiglu_backward(
    d_act: torch.Tensor, z: torch.Tensor, scores: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """From the gradient d_act (R, F) of `swiglu`'s result: that result, d_z and d_scores (R,)."""
    gate, up = _wide(z).chunk(2, dim=1)
    gradient = _wide(d_act)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    act, d_scores = silu * up, None
    if scores is not None:
        d_scores = (gradient * act).sum(1).to(scores.dtype)
        act, gradient = act * scores.unsqueeze(1), gradient * scores.unsqueeze(1)
    d_gate = gradient * up * (sigmoid + silu * (1 - sigmoid))
    d_z = torch.cat([d_gate, gradient * silu], dim=1)
    return act.to(z.dtype), d_z.to(z.dtype), d_scores


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
