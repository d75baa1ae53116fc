"""Which tokens a token may see: masks of packed documents, for each attention kernel.

B batch, L sequence.

Everything derives from the packer's document lengths, never from token ids. The kernel decides the
mask's form: a dense boolean mask for SDPA, a block mask for FlexAttention, document offsets for
varlen attention. All three say the same.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True)
class Pattern:
    """What of its own document, up to itself, a token sees."""

    window: int | None = None
    """Only so many tokens, itself included."""
    chunk: int | None = None
    """Only those of its chunk: so many tokens each, counted from the document's start."""

    def within(self, length: int) -> "Pattern":
        """The same for sequences of this length, without limits that they do not reach."""
        window, chunk = (
            limit if limit is not None and limit < length else None
            for limit in (self.window, self.chunk)
        )
        return Pattern(window, chunk)

    def mean_seen(self, length: int) -> float:
        """How many tokens one sees on average, itself counted half, of a document this long."""
        pairs = 0.0
        for piece in _chunks(length, self.chunk):
            window = min(self.window or piece, piece)
            pairs += window * piece - window * window / 2
        return pairs / length


@dataclass(frozen=True)
class VarlenMask:
    """Where documents begin in the flattened batch: (documents + 1,) int32, padded with B * L."""

    offsets: torch.Tensor
    max_length: int
    window: int | None


AttentionMask = BlockMask | VarlenMask | torch.Tensor | None
"""None is causal over the whole sequence."""


@dataclass(frozen=True)
class Documents:
    """A packed batch's documents as tensors."""

    positions: torch.Tensor
    """(B, L) int64: each token's position in its document."""
    masks: Mapping[Pattern, AttentionMask]

    @classmethod
    def build(
        cls,
        lengths: list[list[int]],
        patterns: Iterable[Pattern],
        attn_type: str,
        device: torch.device,
    ) -> "Documents":
        """From the document lengths of each sequence, for one of "sdpa", "flex", "varlen".

        Flex and varlen have no backward on CPUs: there both become SDPA with a dense mask.
        """
        index = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths])
        starts = np.stack([np.repeat(np.cumsum([0, *row[:-1]]), row) for row in lengths])
        positions = torch.from_numpy(np.arange(index.shape[1]) - starts).to(device)
        if attn_type == "varlen" and device.type == "cuda":
            masks = {pattern: _varlen_mask(lengths, pattern, device) for pattern in patterns}
        else:
            ids = torch.from_numpy(index).to(device, torch.int32)
            make = _block_mask if attn_type == "flex" and device.type == "cuda" else _dense_mask
            masks = {pattern: make(ids, _rule(ids, positions, pattern)) for pattern in patterns}
        return cls(positions, masks)


@functools.cache
def compiled(function: Callable) -> Callable:
    """Flex is fast only compiled, also where the model is not."""
    return torch.compile(function)


def _rule(document_ids: torch.Tensor, positions: torch.Tensor, pattern: Pattern) -> Callable:
    """rule(batch, head, query, key): whether a query sees a key, by their places in a sequence."""

    def sees(batch, head, query, key):
        seen = (query >= key) & (document_ids[batch, query] == document_ids[batch, key])
        if pattern.window is not None:
            seen = seen & (query - key < pattern.window)
        if pattern.chunk is not None:
            chunk_of_query, chunk_of_key = (
                positions[batch, place] // pattern.chunk for place in (query, key)
            )
            seen = seen & (chunk_of_query == chunk_of_key)
        return seen

    return sees


def _dense_mask(document_ids: torch.Tensor, rule: Callable) -> torch.Tensor:
    """(B, 1, L, L) bool, true where a query (row) may see a key (column)."""
    batch, place = (torch.arange(n, device=document_ids.device) for n in document_ids.shape)
    return rule(batch[:, None, None], None, place[None, :, None], place[None, None, :])[:, None]


def _block_mask(document_ids: torch.Tensor, rule: Callable) -> BlockMask:
    batch, length = document_ids.shape
    make = compiled(create_block_mask)
    return make(rule, batch, None, length, length, device=document_ids.device)


def _varlen_mask(lengths: list[list[int]], pattern: Pattern, device: torch.device) -> VarlenMask:
    pieces = [n for row in lengths for length in row for n in _chunks(length, pattern.chunk)]
    offsets = np.cumsum([0, *pieces])
    # Empty documents at the end: the tensor's size changes seldom, so compiled blocks do too.
    padded = 64 * -(-len(offsets) // 64)
    offsets = np.pad(offsets, (0, padded - len(offsets)), mode="edge").astype(np.int32)
    return VarlenMask(torch.from_numpy(offsets).to(device), sum(lengths[0]), pattern.window)


def _chunks(length: int, chunk: int | None) -> Iterator[int]:
    """A document's length in chunks, the last one maybe shorter."""
    for start in range(0, length, chunk or max(length, 1)):
        yield min(chunk or length, length - start)
