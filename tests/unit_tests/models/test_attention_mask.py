"""Which tokens see which, in every form that a kernel takes."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from torchtitan.models.attention import attend
from torchtitan.models.attention_mask import (
    Documents,
    Pattern,
    SpanMasks,
    _causal_mask,
    _varlen_mask,
)
from torchtitan.sequence_part import SequencePart

CPU = torch.device("cpu")
LENGTHS = [[5, 1, 10], [16]]
PATTERNS = [Pattern(), Pattern(window=1), Pattern(window=3), Pattern(chunk=4), Pattern(chunk=4, window=2)]


def sees(lengths, pattern, query, key):
    """By the definition: a document at a time."""
    start = 0
    for length in lengths:
        if start <= key <= query < start + length:
            near = pattern.window is None or query - key < pattern.window
            i, j = query - start, key - start
            return near and (pattern.chunk is None or i // pattern.chunk == j // pattern.chunk)
        start += length
    return False


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dense_masks(pattern):
    documents = Documents.build(LENGTHS, [pattern], "flex", CPU)
    mask = documents.masks[pattern]
    assert mask.shape == (2, 1, 16, 16)
    for row, lengths in enumerate(LENGTHS):
        expected = [[sees(lengths, pattern, q, k) for k in range(16)] for q in range(16)]
        assert mask[row, 0].tolist() == expected
        assert documents.positions[row].tolist() == [i for n in lengths for i in range(n)]


PARTS = [SequencePart(r, 2, head_tail) for r in (0, 1) for head_tail in (False, True)]


@pytest.mark.parametrize("part", [*PARTS, SequencePart(2, 4, True)])
def test_masks_of_a_part_are_rows_of_the_whole_mask_up_to_the_last_query(part):
    places = [place for span in part.spans(16) for place in span]
    whole = Documents.build(LENGTHS, PATTERNS, "sdpa", CPU)
    for queries in (part, SequencePart()):
        ours = Documents.build(LENGTHS, PATTERNS, "sdpa", CPU, part, queries)
        assert torch.equal(ours.positions, whole.positions[:, places])
        for pattern, mask in whole.masks.items():
            rows = mask[:, :, places, : places[-1] + 1] if queries is part else mask
            assert torch.equal(ours.masks[pattern], rows)
    causal = Documents.causal(16, CPU, part, part)
    assert causal.positions.tolist() == [places]
    seen = torch.ones(16, 16, dtype=torch.bool).tril()[places, : places[-1] + 1]
    mask = causal.masks[Pattern()]
    assert (places == list(range(8))) if mask is None else torch.equal(mask[0, 0], seen)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 4, 11, 16])
def test_how_much_is_seen(pattern, length):
    pairs = sum(sees([length], pattern, q, k) for q in range(length) for k in range(length))
    assert pattern.mean_seen(length) == pytest.approx(pairs / length - 0.5)


@pytest.mark.parametrize(
    ("with_sinks", "compiled"), [(False, False), (False, True), (True, False)]
)
def test_what_gpus_are_given_for_causal_parts_says_the_same(with_sinks, compiled):
    """CPUs take the same biases, at the cost of a dense mask each.

    With sinks they cannot be compiled; but families with sinks have windows, which bring other masks.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 16, heads, 8) for heads in (4, 2, 2))
    sinks = torch.randn(4) if with_sinks else None
    function = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    whole = attend(q, k, v, None, None, sinks)
    for part in PARTS:
        end = part.spans(16)[-1].stop
        masks = [_causal_mask(part.spans(16), device) for device in (CPU, torch.device("cuda"))]
        for mask in masks:
            ours = function(part.cut(q), k[:, :end], v[:, :end], mask, None, sinks)
            assert torch.allclose(ours, part.cut(whole), atol=1e-6)


def test_chunks_and_windows_of_the_varlen_kernel():
    mask = _varlen_mask(LENGTHS, Pattern(chunk=4, window=2), [range(16)], CPU)
    assert mask.offsets[:10].tolist() == [0, 4, 5, 6, 10, 14, 16, 20, 24, 28]
    assert set(mask.offsets[10:].tolist()) == {32} and len(mask.offsets) == 64
    assert torch.equal(mask.key_offsets, mask.offsets)
    assert (mask.window, mask.max_length, mask.max_keys) == (2, 16, 16)


def test_the_varlen_kernel_is_told_of_each_span_where_its_queries_see_keys():
    """A document's last query of a span sees its last key; what ends before the span has no query."""
    spans = SequencePart(1, 4, head_tail=True).spans(16)  # 2 to 3, 12 to 13
    masks = _varlen_mask(LENGTHS, Pattern(), spans, CPU)
    assert isinstance(masks, SpanMasks) and masks.spans == ((2, 4), (12, 14))
    first, second = masks.masks
    assert first.offsets[:5].tolist() == [0, 2, 2, 2, 4]
    assert first.key_offsets[:5].tolist() == [0, 4, 4, 4, 8]
    assert (first.max_length, first.max_keys) == (2, 4)
    assert second.offsets[:5].tolist() == [0, 0, 0, 2, 4]
    assert second.key_offsets[:5].tolist() == [0, 5, 6, 14, 28]


def test_limits_beyond_the_sequence_are_none():
    assert Pattern(window=16, chunk=17).within(16) == Pattern()
    assert Pattern(window=15, chunk=8).within(16) == Pattern(window=15, chunk=8)


def test_any_number_of_documents_has_the_same_compiled_code():
    """Of the varlen kernel, whose offsets are as many as there are documents, rounded up."""
    graphs = CompileCounter()
    compiled = torch.compile(lambda x, mask: x + mask.offsets.sum(), backend=graphs)
    for num_documents in (3, 70, 200, 10, 130):
        mask = _varlen_mask([[1] * num_documents], Pattern(), [range(num_documents)], CPU)
        mask = replace(mask, max_length=256, max_keys=256)  # the sequence's
        assert compiled(torch.zeros(1), mask).item() == mask.offsets.sum()
    assert graphs.frame_count == 1
