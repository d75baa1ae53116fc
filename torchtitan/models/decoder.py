"""The decoder that all families share: embedding, blocks, norm, output head; and its configuration.

B batch, L sequence, D model, V vocabulary, C head_dim.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import JobConfig
from torchtitan.models.attention import Attention, AttentionMask, Documents
from torchtitan.models.feed_forward import FeedForward
from torchtitan.models.init import Constant, Init, Normal
from torchtitan.models.loss import linear_cross_entropy
from torchtitan.models.rope import RoPEScaling, rope_table
from torchtitan.sharding import ParallelPlan, Rule, Style, under


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; a flavor is one of these. Frozen: derive with `dataclasses.replace`."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RoPEScaling | None = None
    max_seq_len: int = 131072
    """Longest sequence the positions are meant for; a longer training.seq_len is refused."""
    enable_weight_tying: bool = False
    """One weight serves as embedding and output."""
    attn_type: Literal["sdpa", "flex", "varlen"] = "sdpa"
    """Attention kernel on GPUs; CPUs compute all of them by SDPA."""
    attn_mask_type: Literal["causal", "block_causal"] = "causal"
    """causal: over the whole packed sequence; block_causal: each document by itself."""
    seq_len: int = 0
    """Longest sequence of this run, set by `update_from_config`: the length of the RoPE table."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def update_from_config(self, config: JobConfig) -> "DecoderConfig":
        """A copy that knows the run's facts. Raises ConfigError with every fault; changes nothing."""
        faults = [
            *self._shape_faults(),
            *self._tensor_parallel_faults(config),
            *self._length_faults(config),
        ]
        if faults:
            raise ConfigError(faults)
        return replace(self, seq_len=max(_sequence_lengths(config).values()))

    def _shape_faults(self) -> list[Fault]:
        faults = []
        if self.dim % self.n_heads or self.head_dim % 2:
            faults.append(
                Fault(
                    "model.overrides.n_heads",
                    f"heads must split dim = {self.dim} into equal and even parts.",
                    value=self.n_heads,
                )
            )
        if self.n_heads % self.n_kv_heads:
            faults.append(
                Fault(
                    "model.overrides.n_kv_heads",
                    f"key/value heads must divide the {self.n_heads} query heads.",
                    value=self.n_kv_heads,
                )
            )
        if self.attn_mask_type == "causal" and self.attn_type != "sdpa":
            faults.append(
                Fault(
                    "model.overrides.attn_type",
                    "flex and varlen attention compute the block_causal mask only.",
                    "Set model.overrides.attn_mask_type = 'block_causal'.",
                    value=self.attn_type,
                )
            )
        return faults

    def _tensor_parallel_faults(self, config: JobConfig) -> list[Fault]:
        tp = config.parallelism.tensor_parallel_degree
        sizes = {"heads": self.n_heads, "key/value heads": self.n_kv_heads, "FFN width": self.ffn_dim}
        uneven = [f"{size} ({name})" for name, size in sizes.items() if size % tp]
        if not uneven:
            return []
        common = math.gcd(*sizes.values())
        legal = [degree for degree in range(1, common + 1) if common % degree == 0]
        nearest = sorted(sorted(legal, key=lambda degree: abs(degree - tp))[:2])
        return [
            Fault(
                "parallelism.tensor_parallel_degree",
                f"does not divide {' and '.join(uneven)} of the model.",
                f"Use {' or '.join(map(str, nearest))}.",
                value=tp,
            )
        ]

    def _length_faults(self, config: JobConfig) -> list[Fault]:
        parallelism = config.parallelism
        tp = parallelism.tensor_parallel_degree if parallelism.enable_sequence_parallel else 1
        faults = []
        for key, length in _sequence_lengths(config).items():
            if length > self.max_seq_len:
                reason = f"is beyond the model's limit of {self.max_seq_len} positions."
                remedy = f"Use at most {self.max_seq_len}, or raise model.overrides.max_seq_len."
                faults.append(Fault(key, reason, remedy, length))
            if length % tp:
                below = length // tp * tp
                reason = (
                    f"with parallelism.tensor_parallel_degree = {tp}, sequence parallelism splits "
                    f"every sequence evenly over {tp} ranks."
                )
                remedy = (
                    f"Use {f'{below} or ' if below else ''}{below + tp}, or set "
                    "parallelism.enable_sequence_parallel = false."
                )
                faults.append(Fault(key, reason, remedy, length))
        return faults

    def shrunk(self, tp: int) -> "DecoderConfig":
        """A small model of the same kind for trying a layout with `tp` tensor-parallel ranks."""
        kv_heads = tp
        heads = kv_heads * min(self.n_heads // self.n_kv_heads, 4)
        dim = 8 * heads
        return replace(
            self,
            n_layers=min(self.n_layers, 3),
            dim=dim,
            n_heads=heads,
            n_kv_heads=kv_heads,
            ffn_dim=2 * dim,
            vocab_size=min(self.vocab_size, 256),
        )

    def flops_per_token(self, seq_len: int) -> tuple[float, float]:
        """Forward and backward FLOPs a token, attention counted (in full, by its causal half).

        Matrix products cost 2 FLOPs a weight forward and 4 backward; attention's two products cost
        4 * C * L a head forward (every token against the whole sequence). Recomputation is not
        counted, nor are norms, activations and the embedding's look-up.
        """
        kv_dim = self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * self.dim + 2 * self.dim * kv_dim
        layer = attention + 3 * self.dim * self.ffn_dim
        weights = self.n_layers * layer + self.dim * self.vocab_size
        scores = 12.0 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return 6.0 * weights + scores, 6.0 * weights + scores / 2

    def build(self) -> "Decoder":
        """The model; build it under `torch.device("meta")` and fill it afterwards."""
        return Decoder(self)


def _sequence_lengths(config: JobConfig) -> dict[str, int]:
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable:
        lengths["validation.seq_len"] = config.validation.seq_len
    return lengths


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer_id: int):
        super().__init__()
        # Later layers add less, so that the residual stream's variance stays bounded with depth.
        residual_std = 0.02 / (2 * (layer_id + 1)) ** 0.5
        self.attention = Attention(
            config.dim, config.n_heads, config.n_kv_heads, config.head_dim, residual_std
        )
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, residual_std)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.inits: dict[str, Init] = {
            "attention_norm.weight": Constant(1.0),
            "ffn_norm.weight": Constant(1.0),
        }

    def parallel_rules(self, prefix: str) -> tuple[Rule, ...]:
        """The rules of the blocks at `prefix`."""
        return (
            Rule(f"{prefix}.attention_norm", Style.SEQUENCE),
            *under(f"{prefix}.attention", self.attention.fragment),
            Rule(f"{prefix}.ffn_norm", Style.SEQUENCE),
            *under(f"{prefix}.feed_forward", self.feed_forward.fragment),
        )

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class OutputHead(nn.Module):
    """Projects hidden states to the vocabulary: logits, or straight to the summed loss."""

    def __init__(self, dim: int, vocab_size: int, tied: bool):
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim))
        self.inits: dict[str, Init] = {} if tied else {"weight": _output_init(dim)}
        self.loss = linear_cross_entropy

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None, tied_weight: torch.Tensor | None
    ) -> torch.Tensor:
        weight = self.weight if tied_weight is None else tied_weight
        return F.linear(hidden, weight) if labels is None else self.loss(hidden, weight, labels)


def _output_init(dim: int) -> Init:
    return Normal(dim**-0.5, cutoff=3)  # logits of a normalised state start with variance 1


class Decoder(nn.Module):
    """Token ids to logits, or with labels to the summed loss."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict(
            {str(i): TransformerBlock(config, i) for i in range(config.n_layers)}
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = OutputHead(config.dim, config.vocab_size, config.enable_weight_tying)
        table = torch.empty(config.seq_len, 2, config.head_dim // 2)
        self.register_buffer("rope", table, persistent=False)
        tied = config.enable_weight_tying
        self.inits: dict[str, Init] = {
            "tok_embeddings.weight": _output_init(config.dim) if tied else Normal(1.0),
            "norm.weight": Constant(1.0),
        }

    def fill_buffers(self, device: torch.device) -> None:
        """Compute the buffers, after the model has left the meta device."""
        c = self.config
        self.rope = rope_table(c.head_dim, c.rope_theta, c.rope_scaling, c.seq_len, device)

    def parallel_plan(self) -> ParallelPlan:
        """How this model may be spread; see torchtitan/sharding.py.

        A tied weight is used at both ends, so it stays with the FSDP root, which is gathered throughout.
        """
        block = next(iter(self.layers.values()))
        rules = (
            Rule("tok_embeddings", Style.EMBEDDING),
            *block.parallel_rules("layers.*"),
            Rule("norm", Style.SEQUENCE),
            Rule("output", Style.HEAD),
        )
        units = tuple((f"layers.{name}",) for name in self.layers)
        if not self.config.enable_weight_tying:
            units = (("tok_embeddings",), *units, ("norm", "output"))
        return ParallelPlan(rules, units)

    def documents(self, lengths: list[list[int]], device: torch.device) -> Documents | None:
        """What `forward` must know of a batch's documents; None where the mask ignores them."""
        if self.config.attn_mask_type == "causal":
            return None
        return Documents.build(lengths, self.config.attn_type, device)

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        """tokens, labels (B, L) int64 -> logits (B, L, V), or the summed loss where labels are given.

        The sum is over labels other than -100, fp32, a scalar.
        """
        if documents is None:
            rope, mask = self.rope[None, : tokens.shape[1]], None
        else:
            rope, mask = self.rope[documents.positions], documents.mask
        x = self.tok_embeddings(tokens)  # (B, L, D)
        for layer in self.layers.values():
            x = layer(x, rope, mask)
        tied = self.tok_embeddings.weight if self.config.enable_weight_tying else None
        return self.output(self.norm(x), labels, tied)
