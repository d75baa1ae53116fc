"""Parts of a sequence cover it once, and balanced ones see as many tokens before them."""

import pytest
import torch

from torchtitan.data.batch import IGNORE_INDEX, Batch
from torchtitan.sequence_part import WHOLE, SequencePart


@pytest.mark.parametrize("head_tail", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_parts_cover_a_sequence_once(num_ranks, head_tail):
    x = torch.arange(48).view(2, 24)
    parts = SequencePart(0, num_ranks, head_tail).of_all_ranks()
    cuts = [part.cut(x) for part in parts]
    assert {cut.shape for cut in cuts} == {(2, 24 // num_ranks)}
    assert torch.equal(torch.cat(cuts, dim=1).sort(dim=1).values, x)
    for part, cut in zip(parts, cuts, strict=True):
        assert cut[0].tolist() == [place for span in part.spans(24) for place in span]


def test_head_and_tail_give_every_rank_the_same_work():
    parts = SequencePart(0, 4, head_tail=True).of_all_ranks()
    assert len({sum(place + 1 for span in part.spans(48) for place in span) for part in parts}) == 1


def test_the_default_is_everything():
    x = torch.arange(6).view(1, 6)
    assert WHOLE.cut(x) is x and WHOLE.spans(6) == [range(6)]


def test_a_cut_batch_counts_its_own_labels_and_keeps_the_documents():
    tokens = torch.arange(16).view(2, 8)
    labels = torch.where(tokens % 5 == 0, IGNORE_INDEX, tokens + 1)
    lengths = [[3, 5], [8]]
    whole = Batch(tokens, labels, lengths, int((labels != IGNORE_INDEX).sum()), exhausted=False)
    cuts = [whole.cut(part) for part in SequencePart(0, 2, True).of_all_ranks()]
    assert sum(cut.num_valid_tokens for cut in cuts) == whole.num_valid_tokens
    assert cuts[1].tokens[0].tolist() == [2, 3, 4, 5]
    assert all(cut.document_lengths == lengths for cut in cuts)
