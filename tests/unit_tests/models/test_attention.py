"""Attention equals its definition, with sinks a softmax with one more score, in value and in every gradient."""

import pytest
import torch

from torchtitan.models import attention, attention_mask
from torchtitan.models.attention import attend
from torchtitan.models.attention_mask import Documents, Pattern, _block_mask, _rule, _varlen_mask

CPU = torch.device("cpu")
LENGTH, HEADS, GROUPS, CHANNELS = 9, 4, 2, 6


def by_definition(q, k, v, mask, scale, sinks):
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (k, v))
    scores = torch.einsum("blhc,bmhc->bhlm", q, k) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    sinks = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhlm,bmhv->blhv", weights, v)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, LENGTH, HEADS, CHANNELS)] + 2 * [(2, LENGTH, GROUPS, CHANNELS)] + [(HEADS,)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("pattern", [None, Pattern(), Pattern(window=3), Pattern(chunk=4)], ids=str)
def test_sinks_take_their_share_of_the_softmax(pattern, scale):
    tensors = inputs()
    q, k, v, sinks = tensors
    mask, full = None, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if pattern is not None:
        mask = full = Documents.build([[4, 5], [9]], [pattern], "sdpa", CPU).masks[pattern]
    out = attend(q, k, v, mask, scale, sinks)
    expected = by_definition(q, k, v, full, scale or CHANNELS**-0.5, sinks)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_values_narrower_than_keys_keep_no_scores():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 64, HEADS, width, generator=generator, requires_grad=True) for width in (6, 6, 4)
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = attend(q, k, v, None)
    assert max(kept) == q.numel()
    scores = torch.einsum("blhc,bmhc->bhlm", q, k) * 6**-0.5
    scores = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), float("-inf"))
    expected = torch.einsum("bhlm,bmhv->blhv", scores.softmax(-1), v)
    torch.testing.assert_close(out, expected)
    grads, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
    for ours, theirs in zip(grads, wanted, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_very_low_sinks_take_nothing():
    q, k, v, sinks = inputs()
    out = attend(q, k, v, None, sinks=torch.full_like(sinks, -1e4))
    torch.testing.assert_close(out, attend(q, k, v, None))


def test_bfloat16_stays_bfloat16():
    q, k, v, sinks = inputs(torch.bfloat16)
    out = attend(q, k, v, None, sinks=sinks)
    wide = attend(q.float(), k.float(), v.float(), None, sinks=sinks.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wide, rtol=2e-2, atol=2e-2)


DOCUMENTS = [[4, 5], [9]]
PATTERNS = [Pattern(), Pattern(window=3), Pattern(chunk=4)]


def varlen_by_definition(
    q, k, v, offsets, key_offsets, max_q, max_k, *, window_size, scale=None, enable_gqa=False
):
    """`varlen_attn`, a document at a time: its last query stands at its last key."""
    assert enable_gqa or not attention._VARLEN_TAKES_GQA
    before, after = window_size
    out = torch.zeros_like(q)
    places = zip(*(bounds.tolist() for bounds in (offsets, offsets[1:], key_offsets, key_offsets[1:])))
    for first, last, start, stop in places:
        queries = torch.arange(stop - (last - first), stop)
        distance = queries[:, None] - torch.arange(start, stop)
        seen = (distance >= -after) & ((distance <= before) | (before == -1))
        parts = (x[None] for x in (q[first:last], k[start:stop], v[start:stop]))
        out[first:last] = attend(*parts, seen[None, None], scale)[0]
    return out


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_varlen_kernel_is_asked_for_what_a_dense_mask_says(pattern, scale, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_definition)
    q, k, v, _ = inputs()
    dense = Documents.build(DOCUMENTS, [pattern], "sdpa", CPU).masks[pattern]
    mask = _varlen_mask(DOCUMENTS, pattern, [range(LENGTH)], CPU)
    torch.testing.assert_close(attend(q, k, v, mask, scale), attend(q, k, v, dense, scale))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_flex_is_asked_for_what_a_dense_mask_says(pattern, scale, monkeypatch):
    """Uncompiled, as CPUs can run its forward."""
    for module in (attention, attention_mask):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    q, k, v, sinks = (x.detach() for x in inputs())
    documents = Documents.build(DOCUMENTS, [pattern], "sdpa", CPU)
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    mask = _block_mask(ids, _rule(ids, documents.positions, pattern), [range(LENGTH)])
    for given in (None, sinks):
        ours, theirs = (attend(q, k, v, each, scale, given) for each in (mask, documents.masks[pattern]))
        torch.testing.assert_close(ours, theirs)
