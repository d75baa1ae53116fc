"""The output projection, and the training loss: from hidden states, behind one interface."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.models.init import Init, Normal
from torchtitan.ops import float8_head
from torchtitan.ops.cross_entropy import chunked_linear_cross_entropy


class OutputHead(nn.Module):
    """Projects hidden states to the vocabulary: logits, or straight to the summed loss."""

    def __init__(self, dim: int, vocab_size: int, tied: bool):
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim))
        self.inits: dict[str, Init] = {} if tied else {"weight": output_init(dim)}
        self.loss = chunked_linear_cross_entropy  # tensor parallelism puts its own here

    def quantize(self, recipe: str, emulate: bool) -> None:
        """Let the loss multiply in float8, by a recipe of ops/float8_head.py; logits alone stay exact."""
        products = float8_head.products(recipe, emulate)
        self.loss = partial(chunked_linear_cross_entropy, products=products)

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None, tied_weight: torch.Tensor | None
    ) -> torch.Tensor:
        weight = self.weight if tied_weight is None else tied_weight
        return F.linear(hidden, weight) if labels is None else self.loss(hidden, weight, labels)


def output_init(dim: int) -> Init:
    """How the output weight is drawn: logits of a normalised state start with variance 1."""
    return Normal(dim**-0.5, cutoff=3)
