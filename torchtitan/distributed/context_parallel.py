"""Context parallelism: attention over sequences that are split between ranks.

B batch, n local tokens of a sequence of L, H query heads, G key/value heads, C head_dim, V channels of
a value; P ranks. Between attentions a rank works on its own tokens, and nobody else is asked.

Keys and values come to the queries ("kv"), or each rank takes some heads of whole sequences ("heads",
DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config.schema import Parallelism
from torchtitan.config.sequence_cuts import cuts_head_and_tail
from torchtitan.distributed.comm import register_group
from torchtitan.distributed.mesh import Degrees
from torchtitan.distributed.sequence_exchange import exchange_tokens, gather_tokens
from torchtitan.sequence_part import WHOLE, SequencePart

Attend = Callable[..., torch.Tensor]
"""attend(q (B, L, H, C), k (B, K, G, C), v (B, K, G, V), mask, scale, sinks (H,)) -> (B, L, H, V)."""


def sequence_part(config: Parallelism, degrees: Degrees, rank: int) -> SequencePart:
    """What of every sequence is a rank's."""
    rank = rank // degrees.tp % degrees.cp
    return SequencePart(rank, degrees.cp, cuts_head_and_tail(config))


def apply_context_parallel(
    model: nn.Module, part: SequencePart, mesh: DeviceMesh, config: Parallelism
) -> None:
    """Let attention see whole sequences while `model` is given a part of them, in place.

    `mesh` has the ranks of one sequence. Modules that compute attention have a `core` that does it, all
    of them the same.
    """
    model.sequence_part = part
    model.query_part = WHOLE if config.context_parallel_method == "heads" else part
    attentions = [module for module in model.modules() if hasattr(module, "core")]
    if not attentions:  # a stage of a pipeline without layers
        return
    (attend,) = {attention.core for attention in attentions}
    group = register_group(mesh.get_group())
    if config.context_parallel_method == "heads":
        core = HeadExchange(attend, part.rank, part.num_ranks, group)
    else:
        to_all = config.context_parallel_rotate_method == "allgather"
        core = KeyExchange(attend, part, group, to_all)
    for attention in attentions:
        attention.core = core  # the same object: compiled blocks share their graph


@dataclass(frozen=True)
class KeyExchange:
    """Local queries over the keys and values of all places up to the last of them.

    `to_all`: every rank gets all keys and values, by an all-gather; backward sums their gradients by a
    reduce-scatter. Otherwise each rank gets those that it can see, by an all-to-all each way.
    """

    attend: Attend
    part: SequencePart
    group: str
    to_all: bool

    def __call__(self, q, k, v, mask, scale=None, sinks=None) -> torch.Tensor:
        local = torch.cat([k, v], dim=-1).transpose(0, 1)  # (n, B, G, C + V)
        received, spans = self._gather(local) if self.to_all else self._exchange(local)
        pieces = received.split([len(span) for span in spans])
        order = sorted(range(len(spans)), key=lambda i: spans[i].start)
        end = self._spans(len(local))[self.part.rank][-1].stop
        pieces = [pieces[i].transpose(0, 1) for i in order if spans[i].start < end]
        width = k.shape[-1]
        k = torch.cat([piece[..., :width] for piece in pieces], dim=1)  # (B, end, G, C)
        v = torch.cat([piece[..., width:] for piece in pieces], dim=1)
        return self.attend(q, k, v, mask, scale, sinks)

    def _spans(self, num_tokens: int) -> list[list[range]]:
        """Every rank's places, given how many tokens each has."""
        length = num_tokens * self.part.num_ranks
        return [part.spans(length) for part in self.part.of_all_ranks()]

    def _gather(self, local: torch.Tensor) -> tuple[torch.Tensor, list[range]]:
        spans = [span for of_rank in self._spans(len(local)) for span in of_rank]
        return gather_tokens(local.contiguous(), self.part.num_ranks, self.group), spans

    def _exchange(self, local: torch.Tensor) -> tuple[torch.Tensor, list[range]]:
        spans = self._spans(len(local))
        own = spans[self.part.rank]
        chunks = local.split([len(span) for span in own])
        sent, num_sent = [], []
        for of_rank in spans:
            seen = [c for c, span in zip(chunks, own, strict=True) if span.start < of_rank[-1].stop]
            sent += seen
            num_sent.append(sum(map(len, seen)))
        received = [[s for s in of_rank if s.start < own[-1].stop] for of_rank in spans]
        num_received = [sum(map(len, of_rank)) for of_rank in received]
        tokens = exchange_tokens(torch.cat(sent), num_sent, num_received, self.group)
        return tokens, [span for of_rank in received for span in of_rank]


@dataclass(frozen=True)
class HeadExchange:
    """Whole sequences for 1/P of the heads, and back: one all-to-all each, and each way in backward.

    Sequences are cut plainly, so that the ranks' tokens one after the other are the sequence.
    """

    attend: Attend
    rank: int
    num_ranks: int
    group: str

    def __call__(self, q, k, v, mask, scale=None, sinks=None) -> torch.Tensor:
        widths = [x.shape[-2] * x.shape[-1] // self.num_ranks for x in (q, k, v)]
        # A rank's heads of q, k and v side by side: one message.
        parts = [x.unflatten(2, (self.num_ranks, -1)).flatten(3) for x in (q, k, v)]
        whole = self._exchange(torch.cat(parts, dim=-1).permute(2, 0, 1, 3))  # (P, B, n, W)
        whole = whole.transpose(0, 1).flatten(1, 2)  # (B, L, W)
        q, k, v = (
            x.unflatten(-1, (-1, channels.shape[-1]))
            for x, channels in zip(whole.split(widths, dim=-1), (q, k, v), strict=True)
        )
        if sinks is not None:
            sinks = sinks.unflatten(0, (self.num_ranks, -1))[self.rank]
        out = self.attend(q, k, v, mask, scale, sinks)  # (B, L, H / P, V)
        out = self._exchange(out.unflatten(1, (self.num_ranks, -1)).transpose(0, 1))
        return out.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (P, B, n, H / P, V) to (B, n, H, V)

    def _exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """parts[r] for rank r, to what each rank r has for this one."""
        once = [1] * self.num_ranks
        return exchange_tokens(parts.contiguous(), once, once, self.group)
