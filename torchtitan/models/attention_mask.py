"""Which tokens a token may see: masks of packed documents, for each attention kernel.

B batch, L sequence.

Everything derives from the packer's document lengths, never from token ids. The kernel decides the
mask's form: a dense boolean mask for SDPA, a block mask for FlexAttention, document offsets for
varlen attention. All three say the same.

Where queries are a part of a sequence (context parallelism), keys are all places up to the last query.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch._dynamo
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from torchtitan.sequence_part import WHOLE, SequencePart


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
        pairs = 0
        for piece in _chunks(length, self.chunk):
            window = min(self.window or piece, piece)
            pairs += window * piece - window * (window - 1) // 2
        return pairs / length - 0.5


@dataclass(frozen=True)
class VarlenMask:
    """Where documents begin in the flattened queries and keys: (documents + 1,) int32 each, padded.

    A document's last query sees its last key.
    """

    offsets: torch.Tensor
    key_offsets: torch.Tensor
    max_length: int
    max_keys: int
    window: int | None


@dataclass(frozen=True)
class SpanMasks:
    """Queries from several places of a sequence: each span has a mask over the keys up to its end."""

    spans: tuple[tuple[int, int], ...]
    """First place and the one after the last, ascending."""
    masks: "tuple[AttentionMask, ...]"


@dataclass(frozen=True)
class SeparateMasks:
    """Each document goes through attention by itself, so that no other one changes its bits."""

    lengths: tuple[tuple[int, ...], ...]
    """Of the documents of each sequence."""
    masks: "Mapping[int, AttentionMask]"
    """By the length of a document."""


AttentionMask = BlockMask | VarlenMask | SpanMasks | SeparateMasks | torch.Tensor | None
"""None is causal over a whole sequence."""


@dataclass(frozen=True)
class Documents:
    """A packed batch's documents as tensors."""

    positions: torch.Tensor
    """(B or 1, L) int64: each token's position in its document."""
    masks: Mapping[Pattern, AttentionMask]

    @classmethod
    def build(
        cls,
        lengths: list[list[int]],
        patterns: Iterable[Pattern],
        attn_type: str,
        device: torch.device,
        part: SequencePart = WHOLE,
        queries: SequencePart = WHOLE,
    ) -> "Documents":
        """From the document lengths of each sequence, for one of "sdpa", "flex", "varlen".

        Tokens are a part of each sequence, and so may be the queries inside attention. Flex and varlen
        have no backward on CPUs: there both become SDPA with a dense mask.
        """
        index = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths])
        starts = np.stack([np.repeat(np.cumsum([0, *row[:-1]]), row) for row in lengths])
        positions = torch.from_numpy(np.arange(index.shape[1]) - starts).to(device)
        spans = queries.spans(index.shape[1])
        if attn_type == "varlen" and device.type == "cuda":
            masks = {p: _varlen_mask(lengths, p, spans, device) for p in patterns}
        else:
            ids = torch.from_numpy(index).to(device, torch.int32)
            make = _block_mask if attn_type == "flex" and device.type == "cuda" else _dense_mask
            masks = {p: make(ids, _rule(ids, positions, p), spans) for p in patterns}
        return cls(part.cut(positions), masks)

    @classmethod
    def separate(
        cls, lengths: list[list[int]], patterns: Iterable[Pattern], device: torch.device
    ) -> "Documents":
        """For SDPA of every document by itself, in whole sequences."""
        found = sorted({length for row in lengths for length in row})
        places = {length: torch.arange(length, device=device) for length in found}
        positions = torch.stack([torch.cat([places[n] for n in row]) for row in lengths])
        rows = tuple(map(tuple, lengths))
        masks = {
            pattern: SeparateMasks(rows, {n: _mask_of_one(places[n], pattern) for n in found})
            for pattern in patterns
        }
        return cls(positions, masks)

    @classmethod
    def causal(
        cls, length: int, device: torch.device, part: SequencePart, queries: SequencePart
    ) -> "Documents":
        """For SDPA where every token sees all before it, in sequences of this length."""
        positions = torch.arange(length, device=device)[None]
        mask = _causal_mask(queries.spans(length), device)
        return cls(part.cut(positions), {Pattern(): mask})


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


def _mask_of_one(positions: torch.Tensor, pattern: Pattern) -> torch.Tensor | None:
    """Of one document, given its positions (n,)."""
    pattern = pattern.within(len(positions))
    if pattern == Pattern():
        return None
    positions = positions[None]
    whole = [range(positions.shape[1])]
    ids = torch.zeros_like(positions)
    return _dense_mask(ids, _rule(ids, positions, pattern), whole)


def _causal_mask(spans: list[range], device: torch.device) -> AttentionMask:
    if device.type != "cuda":  # the kernels for a span of queries over more keys are the GPU's
        if spans[0].start == 0 and len(spans) == 1:
            return None
        places = _places(spans, device)
        return (places[:, None] >= torch.arange(spans[-1].stop, device=device))[None, None]
    # Made here: inside a compiled block (torch 2.11 and 2.13) they cannot be.
    biases = [causal_lower_right(len(s), s.stop) if s.start else None for s in spans]
    return _of_spans(spans, biases)


def _of_spans(spans: list[range], masks: Sequence[AttentionMask]) -> AttentionMask:
    if len(spans) == 1:
        return masks[0]
    return SpanMasks(tuple((span.start, span.stop) for span in spans), tuple(masks))


def _places(spans: list[range], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(s.start, s.stop, device=device) for s in spans])


def _dense_mask(document_ids: torch.Tensor, rule: Callable, spans: list[range]) -> torch.Tensor:
    """(B, 1, queries, keys) bool, true where a query (row) may see a key (column)."""
    device = document_ids.device
    batch, keys = (torch.arange(n, device=device) for n in (len(document_ids), spans[-1].stop))
    queries = _places(spans, device)
    return rule(batch[:, None, None], None, queries[None, :, None], keys[None, None, :])[:, None]


def _block_mask(document_ids: torch.Tensor, rule: Callable, spans: list[range]) -> BlockMask:
    device, places = document_ids.device, _places(spans, document_ids.device)

    def sees(batch, head, query, key):
        return rule(batch, head, places[query], key)

    make = compiled(create_block_mask)
    sizes = len(document_ids), None, len(places), spans[-1].stop
    return make(sees if len(places) < spans[-1].stop else rule, *sizes, device=device)


def _varlen_mask(
    lengths: list[list[int]], pattern: Pattern, spans: list[range], device: torch.device
) -> AttentionMask:
    masks = [_varlen_mask_of_span(lengths, pattern, span, device) for span in spans]
    return _of_spans(spans, masks)


def _varlen_mask_of_span(
    lengths: list[list[int]], pattern: Pattern, span: range, device: torch.device
) -> VarlenMask:
    num_queries, num_keys = [], []
    for row in lengths:
        end = 0
        for piece in (n for length in row for n in _chunks(length, pattern.chunk)):
            start, end = end, end + piece
            stop = min(end, span.stop)
            num_queries.append(max(0, stop - max(start, span.start)))
            num_keys.append(max(0, stop - start))
    offsets, key_offsets = (_offsets(counts, device) for counts in (num_queries, num_keys))
    return VarlenMask(offsets, key_offsets, len(span), span.stop, pattern.window)


def _offsets(counts: list[int], device: torch.device) -> torch.Tensor:
    offsets = np.cumsum([0, *counts])
    # Empty documents at the end: the tensor's size changes seldom.
    padded = 64 * -(-len(offsets) // 64)
    offsets = np.pad(offsets, (0, padded - len(offsets)), mode="edge").astype(np.int32)
    offsets = torch.from_numpy(offsets).to(device)
    torch._dynamo.maybe_mark_dynamic(offsets, 0)  # and compiled blocks never for its sake
    return offsets


def _chunks(length: int, chunk: int | None) -> Iterator[int]:
    """A document's length in chunks, the last one maybe shorter."""
    for start in range(0, length, chunk or max(length, 1)):
        yield min(chunk or length, length - start)
