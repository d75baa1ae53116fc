"""With debug.batch_invariant a document's logits have the same bits in any batch, and at any place in it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.unit_tests.models.helpers import CPU, build
from tests.unit_tests.models.test_packed_documents import FLAVORS
from torchtitan.models.attention_mask import Documents, Pattern
from torchtitan.ops.batch_invariance import BatchInvariance

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LENGTH = 45
ROWS = [[5, 1, 10, 29], [45], [20, 25], [7] * 6 + [3], [1] * 45]
"""Documents of five sequences."""


def invariant(family, dtype, **changes):
    """A small model of the family as debug.batch_invariant makes it, and five sequences."""
    config = FLAVORS[family].shrunk(2)
    moe = config.moe and replace(config.moe, experts_backend="reference")
    config = replace(config, moe=moe, batch_invariant=True, vocab_size=64, seq_len=LENGTH, **changes)
    model = build(config)
    model.to(dtype).rope = model.rope.float()
    return model, torch.randint(64, (5, LENGTH), generator=torch.Generator().manual_seed(0))


def packed(model, tokens, lengths):
    return model(tokens, documents=model.documents(lengths, CPU))


@pytest.fixture(params=[1, 3])
def num_threads(request):
    """An odd number shares out work at odd places."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("family", FLAVORS)
@pytest.mark.parametrize("length", [5, LENGTH])
def test_a_sequence_alone_equals_itself_in_a_batch(length, family, dtype, num_threads):
    model, tokens = invariant(family, dtype, attn_mask_type="causal")
    tokens = tokens[:, :length]
    with torch.no_grad(), BatchInvariance():
        five = model(tokens)
        for row in range(5):
            assert torch.equal(model(tokens[row : row + 1])[0], five[row])
        for pair in ([3, 0], [4, 4]):
            assert torch.equal(model(tokens[pair]), five[pair])


@DTYPES
@pytest.mark.parametrize("family", FLAVORS)
def test_a_packed_document_equals_itself_alone(family, dtype, num_threads):
    model, tokens = invariant(family, dtype, attn_mask_type="block_causal")
    with torch.no_grad(), BatchInvariance():
        five = packed(model, tokens, ROWS)
        for row, lengths in enumerate(ROWS):
            pieces = tokens[row].split(lengths), five[row].split(lengths)
            for piece, expected in zip(*pieces, strict=True):
                alone = packed(model, piece[None], [[len(piece)]])[0]
                assert torch.equal(alone, expected), (row, len(piece))


@pytest.mark.parametrize("family", FLAVORS)
def test_it_computes_the_same_model(family):
    """Logits, and every gradient."""
    model, tokens = invariant(family, torch.float64, attn_mask_type="block_causal")
    plain = build(replace(model.config, batch_invariant=False)).double()
    plain.rope = plain.rope.float()
    with BatchInvariance():
        packed(model, tokens, ROWS).square().sum().backward()
    packed(plain, tokens, ROWS).square().sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - expected[name].grad).norm()
        assert difference < 1e-6 * expected[name].grad.norm(), name  # experts add up in fp32


@DTYPES
@pytest.mark.parametrize("width", [7, 24, 1000])
@pytest.mark.parametrize("function", [F.silu, torch.sigmoid, torch.rsqrt])
def test_functions_of_numbers_do_not_depend_on_their_place(function, width, dtype, num_threads):
    x = torch.rand(67, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with BatchInvariance():
        whole = function(x)
        for start, stop in [(0, 1), (3, 4), (66, 67), (5, 40), (1, 67)]:
            assert torch.equal(function(x[start:stop].clone()), whole[start:stop])


@DTYPES
@pytest.mark.parametrize(("rows", "width", "out_width"), [(0, 5, 3), (1, 7, 9), (63, 16, 16), (130, 250, 33)])
def test_products_are_right(rows, width, out_width, dtype):
    a, b, term = torch.randn(rows, width), torch.randn(out_width, width).t(), torch.randn(out_width)
    a, b, term = (x.to(dtype) for x in (a, b, term))
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
    expected = a.double() @ b.double()
    with BatchInvariance():
        torch.testing.assert_close((a @ b).double(), expected, **tolerance)
        found = torch.addmm(term, a, b, beta=2, alpha=-1)
    torch.testing.assert_close(found.double(), 2 * term.double() - expected, **tolerance)


def test_documents_by_themselves_see_what_masks_let_them_see():
    lengths = [[5, 1, 10], [16]]
    patterns = [Pattern(), Pattern(window=3), Pattern(chunk=4)]
    whole = Documents.build(lengths, patterns, "sdpa", CPU)
    each = Documents.separate(lengths, patterns, CPU)
    assert torch.equal(each.positions, whole.positions)
    for pattern in patterns:
        for row, of_row in enumerate(lengths):
            start = 0
            for n in of_row:
                mask = each.masks[pattern].masks[n]
                mask = torch.ones(n, n, dtype=torch.bool).tril() if mask is None else mask[0, 0]
                part = slice(start, start + n)
                assert torch.equal(mask, whole.masks[pattern][row, 0, part, part])
                start += n
