"""The decoder that all families share: embedding, blocks, norm, output head; and its configuration.

B batch, L sequence, D model, V vocabulary, C head_dim.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.pipeline_faults import pipeline_faults
from torchtitan.config.schema import JobConfig
from torchtitan.models.attention import Attention
from torchtitan.models.attention_mask import AttentionMask, Documents, Pattern
from torchtitan.models.feed_forward import FeedForward
from torchtitan.models.init import Constant, Init, Normal
from torchtitan.models.limits import (
    context_parallel_faults,
    expert_parallel_faults,
    length_faults,
    no_expert_faults,
    routing_faults,
    sequence_lengths,
    size_faults,
    tensor_parallel_faults,
)
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.moe import MoE
from torchtitan.models.output_head import OutputHead, output_init
from torchtitan.models.rope import RoPEScaling, rope_table
from torchtitan.sequence_part import WHOLE
from torchtitan.sharding import ParallelPlan, Rule, Style, under


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; a flavor is one of these. Frozen: derive with `dataclasses.replace`."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    """Hidden width of the feed-forward in dense layers; 0 where every layer has experts."""
    vocab_size: int
    moe: MoEConfig | None = None
    """Experts, in every layer after the first `n_dense_layers`."""
    n_dense_layers: int = 0
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
    batch_invariant: bool = field(default=False, metadata={"set_by": "debug.batch_invariant"})
    """Each document goes through attention by itself."""
    seq_len: int = field(default=0, metadata={"set_by": "training.seq_len"})
    """Longest sequence of this run: the length of the RoPE table."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def rope_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.head_dim

    @property
    def position_channels(self) -> int:
        """Columns of `position_table`."""
        return self.rope_dim // 2

    @property
    def n_moe_layers(self) -> int:
        return sum(self.is_moe_layer(layer_id) for layer_id in range(self.n_layers))

    def attention_pattern(self, layer_id: int) -> Pattern:
        """What a layer's attention sees of a token's document."""
        return Pattern()

    def is_moe_layer(self, layer_id: int) -> bool:
        """Whether a layer has experts in place of its feed-forward."""
        return self.moe is not None and layer_id >= self.n_dense_layers

    def update_from_config(self, config: JobConfig) -> "DecoderConfig":
        """A copy that knows the run's facts, the fields that other keys set.

        Raises ConfigError with every fault; changes nothing.
        """
        if faults := list(self._size_faults()):
            raise ConfigError(faults)  # the other rules divide by sizes
        faults = [
            *self._shape_faults(),
            *tensor_parallel_faults(
                config.parallelism.tensor_parallel_degree, self._split_sizes(config)
            ),
            *context_parallel_faults(config, self._heads()),
            *length_faults(config, self.max_seq_len),
            *pipeline_faults(config, self.n_layers),
        ]
        if self.n_moe_layers:
            faults += [*routing_faults(self.moe), *expert_parallel_faults(config, self.moe)]
        else:
            faults += no_expert_faults(config)
        if faults:
            raise ConfigError(faults)
        moe = self.moe and replace(
            self.moe,
            force_load_balance=config.debug.moe_force_load_balance,
            experts_backend=(
                "reference" if config.debug.batch_invariant else config.moe.experts_backend
            ),
            max_rows_per_chunk=config.moe.max_rows_per_chunk,
            sequence_balance_coeff=config.moe.sequence_balance_coeff,
            global_balance_coeff=config.moe.global_balance_coeff,
            router_z_coeff=config.moe.router_z_coeff,
        )
        return replace(
            self,
            moe=moe,
            batch_invariant=config.debug.batch_invariant,
            seq_len=max(sequence_lengths(config).values()),
        )

    def _size_faults(self) -> Iterator[Fault]:
        names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size"]
        if self.n_moe_layers < self.n_layers:
            names.append("ffn_dim")
        yield from size_faults("model.overrides", {name: getattr(self, name) for name in names})
        if self.moe is not None:
            names = ("num_experts", "ffn_dim", "num_expert_groups", "num_scores_per_group")
            sizes = {name: getattr(self.moe, name) for name in names}
            yield from size_faults("model.overrides.moe", sizes)

    def _shape_faults(self) -> Iterator[Fault]:
        """What of the flavor's own fields does not fit together, as overrides may bring about."""
        yield from self._head_faults()
        if self.n_heads % self.n_kv_heads:
            reason = f"key/value heads must divide the {self.n_heads} query heads."
            yield Fault("model.overrides.n_kv_heads", reason, value=self.n_kv_heads)

    def _head_faults(self) -> Iterator[Fault]:
        if self.dim % self.n_heads or self.head_dim % 2:
            reason = f"heads must split dim = {self.dim} into equal and even parts."
            yield Fault("model.overrides.n_heads", reason, value=self.n_heads)

    def _heads(self) -> dict[str, int]:
        return {"heads": self.n_heads, "key/value heads": self.n_kv_heads}

    def _split_sizes(self, config: JobConfig) -> dict[str, int]:
        """What tensor parallelism splits, by name."""
        sizes = self._heads()
        if self.n_moe_layers < self.n_layers:
            sizes["FFN width"] = self.ffn_dim
        if self.n_moe_layers:
            shared = self.moe.num_shared_experts
            sizes |= {"shared experts' width": shared * self.moe.ffn_dim} if shared else {}
            if config.parallelism.expert_parallel_degree == 1:
                sizes["experts' width"] = self.moe.ffn_dim
        return sizes

    def shrunk(self, tp: int) -> "DecoderConfig":
        """A small model of the same kind for trying a layout with `tp` tensor-parallel ranks.

        Its experts can be spread over 2, 4 or 8 ranks.
        """
        kv_heads = tp
        heads = kv_heads * min(self.n_heads // self.n_kv_heads, 4)
        dim = 8 * heads
        moe = self.moe and replace(
            self.moe,
            num_experts=max(8, 2 * self.moe.num_expert_groups),
            top_k=min(self.moe.top_k, 4),
            ffn_dim=dim,
        )
        return replace(
            self,
            n_layers=min(self.n_layers, 3),
            n_dense_layers=min(self.n_dense_layers, 1),
            dim=dim,
            n_heads=heads,
            n_kv_heads=kv_heads,
            ffn_dim=2 * dim if self.ffn_dim else 0,
            # Split over the ranks as unevenly as the whole vocabulary.
            vocab_size=min(self.vocab_size, 256 // tp * tp + self.vocab_size % tp),
            moe=moe,
        )

    def attention_costs(self) -> tuple[int, int]:
        """A layer's attention weights, and the channels that its two products run over."""
        width = self.n_heads * self.head_dim
        return 2 * self.dim * (width + self.n_kv_heads * self.head_dim), 2 * width

    def position_table(self, device: torch.device) -> torch.Tensor:
        """What layers know of each position, fp32 (seq_len, 2, position_channels): `rope_table`."""
        return rope_table(self.rope_dim, self.rope_theta, self.rope_scaling, self.seq_len, device)

    def build_attention(self, layer_id: int, residual_std: float) -> nn.Module:
        """A layer's attention: forward(x, rope, mask) on (B, L, D), with a `fragment`."""
        return Attention(self.dim, self.n_heads, self.n_kv_heads, self.head_dim, residual_std)

    def build_block(self, layer_id: int) -> "TransformerBlock":
        """A layer."""
        return TransformerBlock(self, layer_id)

    def build(self) -> "Decoder":
        """The model; build it under `torch.device("meta")` and fill it afterwards."""
        return Decoder(self)


@dataclass(frozen=True)
class WideHeadsConfig(DecoderConfig):
    """A decoder whose heads need not split `dim`."""

    head_dim: int = 128

    def _head_faults(self) -> Iterator[Fault]:
        if self.head_dim % 2:
            reason = "channels are rotated in pairs."
            yield Fault("model.overrides.head_dim", reason, value=self.head_dim)

    def shrunk(self, tp: int) -> "WideHeadsConfig":
        return replace(super().shrunk(tp), head_dim=8)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward or experts, each behind a norm and added to the residual."""

    def __init__(self, config: DecoderConfig, layer_id: int):
        super().__init__()
        # Later layers add less, so that the residual stream's variance stays bounded with depth.
        residual_std = 0.02 / (2 * (layer_id + 1)) ** 0.5
        self.attention = config.build_attention(layer_id, residual_std)
        self.pattern = config.attention_pattern(layer_id).within(config.seq_len)
        if config.is_moe_layer(layer_id):
            self.moe = MoE(config.dim, config.moe, residual_std)
            self.feed_forward = None
        else:
            self.moe = None
            self.feed_forward = FeedForward(config.dim, config.ffn_dim, residual_std)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.inits: dict[str, Init] = {
            "attention_norm.weight": Constant(1.0),
            "ffn_norm.weight": Constant(1.0),
        }

    def parallel_rules(self, prefix: str) -> tuple[Rule, ...]:
        """The rules of blocks like this one at `prefix`."""
        name = "feed_forward" if self.moe is None else "moe"
        return (
            Rule(f"{prefix}.attention_norm", Style.SEQUENCE),
            *under(f"{prefix}.attention", self.attention.fragment),
            Rule(f"{prefix}.ffn_norm", Style.SEQUENCE),
            *under(f"{prefix}.{name}", getattr(self, name).fragment),
        )

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask)
        feed_forward = self.feed_forward if self.moe is None else self.moe
        return x + feed_forward(self.ffn_norm(x))


TIED_WEIGHT = "tok_embeddings.weight"
"""The one weight of both ends, where there is one."""

_END_RULES = {
    "tok_embeddings": Rule("tok_embeddings", Style.EMBEDDING),
    "norm": Rule("norm", Style.SEQUENCE),
    "output": Rule("output", Style.HEAD),
}


class Decoder(nn.Module):
    """Token ids to logits, or with labels to the summed loss; or a stage of a pipeline doing that."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        # Context parallelism says which tokens of a sequence are here, and which query in attention.
        self.sequence_part = self.query_part = WHOLE
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict(
            {str(i): config.build_block(i) for i in range(config.n_layers)}
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = OutputHead(config.dim, config.vocab_size, config.enable_weight_tying)
        table = torch.empty(config.seq_len, 2, config.position_channels)
        self.register_buffer("rope", table, persistent=False)
        tied = config.enable_weight_tying
        self.inits: dict[str, Init] = {
            "tok_embeddings.weight": output_init(config.dim) if tied else Normal(1.0),
            "norm.weight": Constant(1.0),
        }

    def keep(self, modules: Collection[str]) -> None:
        """Become the stage of a pipeline that has these modules: tok_embeddings, layers.N, norm, output.

        What stays keeps its name. A tied weight stays with both of its uses.
        """
        tied = self.config.enable_weight_tying and "output" in modules
        for name in ("tok_embeddings", "norm", "output"):
            if name not in modules and not (tied and name == "tok_embeddings"):
                setattr(self, name, None)
        self.layers = nn.ModuleDict({n: x for n, x in self.layers.items() if f"layers.{n}" in modules})

    def fill_buffers(self, device: torch.device) -> None:
        """Compute the buffers, after the model has left the meta device."""
        self.rope = self.config.position_table(device)
        for layer in self.layers.values():
            if layer.moe is not None:
                layer.moe.fill_buffers(device)

    def set_global_batch(self, num_sequences: int) -> None:
        """Say how many sequences a step takes: what losses on the global batch are means over."""
        for layer in self.layers.values():
            if layer.moe is not None:
                layer.moe.sequences_per_step = num_sequences

    def parallel_plan(self) -> ParallelPlan:
        """How this model may be spread; see torchtitan/sharding.py.

        A tied weight is used at both ends, so it stays with the FSDP root, which is gathered throughout.
        """
        # Each rule once: layers of one kind have the same, dense and MoE layers share some.
        blocks = dict.fromkeys(
            rule for block in self.layers.values() for rule in block.parallel_rules("layers.*")
        )
        first, last = self._present("tok_embeddings"), self._present("norm", "output")
        rules = (*(_END_RULES[name] for name in first), *blocks, *(_END_RULES[name] for name in last))
        units = tuple((f"layers.{name}",) for name in self.layers)
        if not self.config.enable_weight_tying:
            units = tuple(unit for unit in (first, *units, last) if unit)
        return ParallelPlan(rules, units)

    def _present(self, *names: str) -> tuple[str, ...]:
        return tuple(name for name in names if getattr(self, name) is not None)

    def documents(self, lengths: list[list[int]], device: torch.device) -> Documents | None:
        """What `forward` must know of a batch's documents, given the lengths of whole sequences.

        None where every token is here and sees all before it, which SDPA knows by itself.
        """
        parts, attn_type = (self.sequence_part, self.query_part), self.config.attn_type
        causal = self.config.attn_mask_type == "causal"
        if causal:
            lengths = [[sum(row)] for row in lengths]
        if self.config.batch_invariant:
            return Documents.separate(lengths, self.patterns, device)
        if causal and self.patterns == {Pattern()} and attn_type == "sdpa":
            if self.sequence_part == WHOLE:
                return None
            return Documents.causal(lengths[0][0], device, *parts)
        return Documents.build(lengths, self.patterns, attn_type, device, *parts)

    @property
    def patterns(self) -> set[Pattern]:
        """What the layers' attention sees; a mask is made for each."""
        return {layer.pattern for layer in self.layers.values()}

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        documents: Documents | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens, labels (B, L) int64 -> logits (B, L, V), or the summed loss where labels are given.

        The sum is over labels other than -100, fp32, a scalar. Without documents each sequence is one.
        A stage of a pipeline takes the `hidden` states (B, L, D) of the one before, and all but the
        last return their own.
        """
        plain = (self.patterns, self.sequence_part) == ({Pattern()}, WHOLE)
        if documents is None and (self.config.batch_invariant or not plain):
            length = tokens.shape[1] * self.sequence_part.num_ranks
            documents = self.documents([[length]] * len(tokens), tokens.device)
        if documents is None:
            rope, masks = self.rope[None, : tokens.shape[1]], {Pattern(): None}
        else:
            rope, masks = self.rope[documents.positions], documents.masks
        x = self.tok_embeddings(tokens) if hidden is None else hidden  # (B, L, D)
        for layer in self.layers.values():
            x = layer(x, rope, masks[layer.pattern])
        x = x if self.norm is None else self.norm(x)
        if self.output is None:
            return x
        tied = self.tok_embeddings.weight if self.config.enable_weight_tying else None
        return self.output(x, labels, tied)
