"""What a dense training step is made of: its products and attention to run, its passes' bytes to count."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from common import Work

import torch

from torchtitan.models.attention import attend
from torchtitan.models.decoder import DecoderConfig
from torchtitan.models.flops import flops_per_token
from torchtitan.ops.cross_entropy import EXACT, both_sides, chunked_linear_cross_entropy

PARTS = {
    "products": {"products"},
    "attention": {"attention"},
    "both": {"products", "attention"},
    "in one go": {"products", "attention", "passes"},
}
LARGEST_COPY = 2**27
"""Numbers of four bytes."""


def widths(config: DecoderConfig) -> tuple[int, int]:
    """Channels of a layer's queries, and of its keys or values."""
    return config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim


def linear_sizes(config: DecoderConfig, joined: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(inputs, outputs) of a layer's products, those before attention and those behind it."""
    (q, k), dim, ffn = widths(config), config.dim, config.ffn_dim
    if joined:
        return [(dim, q + 2 * k)], [(q, dim), (dim, 2 * ffn), (ffn, dim)]
    return [(dim, q), (dim, k), (dim, k)], [(q, dim), (dim, ffn), (dim, ffn), (ffn, dim)]


def operations(config: DecoderConfig, num_tokens: int, seq_len: int) -> dict[str, float]:
    """FLOPs of a step, by part: those that training reports."""
    weights = sum(i * o for sizes in linear_sizes(config, joined=False) for i, o in sizes)
    products = 6.0 * num_tokens * (config.n_layers * weights + config.dim * config.vocab_size)
    both = num_tokens * flops_per_token(config, seq_len)[1]
    return {"products": products, "attention": both - products, "both": both}


def fewest_bytes(config: DecoderConfig, num_tokens: int, joined: bool) -> dict[str, int]:
    """That all but products and attention must move in a step; forward and backward of one layer.

    As if all that lies between two products, or a product and attention, were one pass that reads once what
    it needs, and writes once what is needed later. Numbers of two bytes, a token and layer of width D,
    feed-forward H, queries Q, keys and values K each:

    - 8D forward: twice a residual and a branch's output are read, their sum and its norm written
    - 8D backward: twice a norm's gradient and input and the residual's gradient are read, a sum written
    - 3D backward: of q, k, v and of gate, up each has its own gradient of the input. Three more are read,
      by the norm's pass or by products that add to them; none where weights are joined
    - 2 (Q + K) forward and again backward: rotation reads and writes queries and keys
    - 3H forward: SwiGLU reads gate and up, writes h, which is kept
    - 5H backward: SwiGLU reads h's gradient, gate and up, writes two gradients

    Logits are read once and their gradient is written, 4 bytes. AdamW moves 30 bytes a weight: it reads and
    writes fp32 weights and two moments, writes bf16 copies, and reads bf16 gradients, which their norm for
    clipping has read before. Left out: the embedding with the first norm forward and the last backward,
    tables and statistics, the rounding of the head's gradients.
    """
    (q, k), dim, ffn = widths(config), config.dim, config.ffn_dim
    partial_gradients = 0 if joined else 3 * dim
    with torch.device("meta"):
        num_weights = sum(weight.numel() for weight in config.build().parameters())
    return {
        "forward": 2 * num_tokens * (8 * dim + 2 * (q + k) + 3 * ffn),
        "backward": 2 * num_tokens * (8 * dim + partial_gradients + 2 * (q + k) + 5 * ffn),
        "loss": 4 * num_tokens * config.vocab_size,
        "optimizer": 30 * num_weights,
    }


class Linear:
    """The products of a Linear layer: x (T, I), weight (O, I), grad (T, O), all random."""

    part = "products"

    def __init__(self, num_tokens: int, num_inputs: int, num_outputs: int, **kind: Any):
        sizes = (num_tokens, num_inputs), (num_outputs, num_inputs), (num_tokens, num_outputs)
        self.x, self.weight, self.grad = (torch.randn(size, **kind) for size in sizes)

    def forward(self) -> None:
        self.x @ self.weight.t()

    def backward(self) -> None:
        self.grad @ self.weight
        self.grad.t() @ self.x


class Attention:
    """Causal attention of random q (B, L, H, C), k and v (B, L, G, C): backward of forwards before it."""

    part = "attention"

    def __init__(self, config: DecoderConfig, num_sequences: int, seq_len: int, **kind: Any):
        heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads, config.n_heads)
        sizes = [(num_sequences, seq_len, number, config.head_dim) for number in heads]
        *inputs, self.grad = (torch.randn(size, **kind) for size in sizes)
        self.inputs = [x.requires_grad_() for x in inputs]
        self.outs: list[torch.Tensor] = []

    def forward(self) -> None:
        self.outs.append(attend(*self.inputs, None))

    def backward(self) -> None:
        torch.autograd.grad(self.outs.pop(), self.inputs, self.grad)


class Passes:
    """In their place, copies that read half of so many bytes and write the other half."""

    part = "passes"

    def __init__(self, num_bytes: dict[str, int], device: str):
        length = min(LARGEST_COPY, max(num_bytes.values()) // 8)
        self.source, self.target = torch.randn(2, length, device=device)
        self.forward, self.backward, self.loss, self.optimizer = (
            partial(self.copy, num_bytes[name] // 8) for name in ("forward", "backward", "loss", "optimizer")
        )

    def copy(self, size: int) -> None:
        for start in range(0, size, len(self.source)):
            piece = min(len(self.source), size - start)
            self.target[:piece].copy_(self.source[:piece])


def head(config: DecoderConfig, num_tokens: int, **kind: Any) -> Work:
    """Its products, as training chunks them, without the loss's passes over logits.

    With them comes a copy of the hidden states' gradient, 4D bytes a token.
    """
    products = replace(EXACT, loss=lambda logits, labels, needed: (labels, both_sides(logits, needed)))
    hidden, weight = (
        torch.randn(rows, config.dim, **kind, requires_grad=True) for rows in (num_tokens, config.vocab_size)
    )
    labels = torch.zeros(num_tokens, device=hidden.device)
    return lambda: chunked_linear_cross_entropy(hidden, weight, labels, products)


def steps(
    config: DecoderConfig, attention: Attention, head: Work, passes: Passes, linears: Sequence[list[Linear]]
) -> dict[str, Work]:
    """Of `PARTS`, each in the step's order. One layer's tensors serve all layers."""
    before, after = linears
    layer = [*before, attention, *after, passes]
    forward = [(of.part, of.forward) for of in layer] * config.n_layers
    backward = [(of.part, of.backward) for of in reversed(layer)] * config.n_layers
    ends = [("products", head), ("passes", passes.loss)]
    step = [*forward, *ends, *backward, ("passes", passes.optimizer)]
    return {
        name: one_by_one([work for part, work in step if part in parts]) for name, parts in PARTS.items()
    }


def one_by_one(works: Sequence[Work]) -> Work:
    def run():
        for work in works:
            work()

    return run
