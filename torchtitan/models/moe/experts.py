"""The experts of one MoE layer: feed-forward layers that share an operator, not their weights.

R rows sorted by expert, D model, F expert width, E experts, e of them here.
"""

import torch
from torch import nn

from torchtitan.models.init import Constant, Init, Normal, PerExpert
from torchtitan.ops.experts import grouped_experts
from torchtitan.ops.swiglu import Gating
from torchtitan.routing import RowOrder

GATINGS = {"swiglu": Gating(), "gpt_oss": Gating(alpha=1.702, limit=7.0, up_offset=1.0)}


class GroupedExperts(nn.Module):
    """w2(silu(w1 x) * w3 x) of each row's expert, times the row's score.

    `activation`, a key of `GATINGS`, may have another function in silu's place; with `bias` the
    projections have biases. `backend` "auto" multiplies by grouped GEMM where there is one, else
    expert by expert; "fused" and "unfused" too, and say whether gathers and gating happen inside of
    products; "reference" in fixed blocks, so that a row's bits do not depend on how many
    rows there are; those of ops/quantized_kernels.py in few bits, where each expert's rows are as
    many as they ask. `max_rows_per_chunk` > 0 bounds the rows of intermediates at a time.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        residual_std: float,
        backend: str = "auto",
        max_rows_per_chunk: int = 0,
        activation: str = "swiglu",
        bias: bool = False,
    ):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(num_experts, 2, hidden_dim, dim))  # gate, up
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        b13 = nn.Parameter(torch.empty(num_experts, 2, hidden_dim)) if bias else None
        self.register_parameter("b13", b13)
        b2 = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.register_parameter("b2", b2)
        self.gating = GATINGS[activation]
        self.backend = backend
        self.max_rows_per_chunk = max_rows_per_chunk
        self.inits: dict[str, Init] = {
            "w13": PerExpert(Normal(0.02, cutoff=3)),
            "w2": PerExpert(Normal(residual_std, cutoff=3)),
        }
        if bias:
            self.inits |= {name: PerExpert(Constant(0.0)) for name in ("b13", "b2")}

    def forward(
        self,
        x: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        scores: torch.Tensor | None = None,
        order: RowOrder | None = None,
    ) -> torch.Tensor:
        """Rows x (R, D), num_tokens_per_expert (e,) int64, scores (R,) fp32 or None -> (R, D).

        Counts may sum to less than R: the rows after them give zeros and get zero gradients. With
        `order`, x are tokens (T, D) whose rows it tells, scores (T, K), and the result is the sum of
        each one's.
        """
        y, _ = grouped_experts(
            x,
            self.w13,
            self.w2,
            self.b13,
            self.b2,
            num_tokens_per_expert,
            scores,
            None if order is None else order.rows,
            len(x if order is None else order.slots),
            list(self.gating),
            self.backend,
            self.max_rows_per_chunk,
        )
        return y
