"""The dense feed-forward layer: SwiGLU (arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.models.init import Init, Normal
from torchtitan.sharding import Fragment, Style


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x), of width `hidden_dim` inside."""

    fragment: Fragment = {
        "": Style.GATHER,
        "w1": Style.COLWISE,
        "w2": Style.ROWWISE,
        "w3": Style.COLWISE,
    }

    def __init__(self, dim: int, hidden_dim: int, residual_std: float):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.inits: dict[str, Init] = {
            "w1.weight": Normal(0.02, cutoff=3),
            "w2.weight": Normal(residual_std, cutoff=3),
            "w3.weight": Normal(residual_std, cutoff=3),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
