"""Which tokens see which, in every form that a kernel takes."""

import pytest
import torch

from torchtitan.models.attention_mask import Documents, Pattern, _varlen_mask

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


def test_chunks_and_windows_of_the_varlen_kernel():
    mask = _varlen_mask(LENGTHS, Pattern(chunk=4, window=2), CPU)
    assert mask.offsets[:10].tolist() == [0, 4, 5, 6, 10, 14, 16, 20, 24, 28]
    assert set(mask.offsets[10:].tolist()) == {32} and len(mask.offsets) == 64
    assert (mask.window, mask.max_length) == (2, 16)


def test_limits_beyond_the_sequence_are_none():
    assert Pattern(window=16, chunk=17).within(16) == Pattern()
    assert Pattern(window=15, chunk=8).within(16) == Pattern(window=15, chunk=8)
