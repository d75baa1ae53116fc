"""Where rows are placed without a host that knows how many there are, and when ranks wait for each other."""

import pytest
import torch

from torchtitan.distributed.expert_parallel.peer_exchange import PeerExchange, Sizes, place_rows
from torchtitan.ops.peer_rows import PeerTensor, pull, push

RANKS, TOKENS, TOP_K, EXPERTS = 3, 5, 2, 6
LOCAL = EXPERTS // RANKS


def choices_of_all(num_tokens):
    """Each rank's choices by loops: experts and places among equals, and counts."""
    draw = torch.Generator().manual_seed(0)
    choices = torch.full((RANKS, 2, TOKENS, TOP_K), -1, dtype=torch.int32)
    counts = torch.zeros(RANKS, EXPERTS, dtype=torch.int64)
    for rank, number in enumerate(num_tokens):
        for token in range(number):
            for k, expert in enumerate(torch.randperm(EXPERTS, generator=draw)[:TOP_K].tolist()):
                choices[rank, :, token, k] = torch.tensor([expert, counts[rank, expert]])
                counts[rank, expert] += 1
    return choices, counts


@pytest.mark.parametrize("room", [100, 7])
@pytest.mark.parametrize("num_tokens", [(5, 5, 5), (4, 0, 5), (0, 0, 0)], ids=str)
def test_rows_lie_by_expert_then_rank_then_token(num_tokens, room):
    choices, counts = choices_of_all(num_tokens)
    for rank in range(RANKS):
        rows = sorted(
            (expert, source, token, k)
            for source in range(RANKS)
            for token in range(TOKENS)
            for k, expert in enumerate(choices[source, 0, token].tolist())
            if expert // LOCAL == rank
        )
        placed = place_rows(choices, counts, rank, room)
        expected = torch.full((RANKS, TOKENS, TOP_K), -1, dtype=torch.int32)
        for row, (_, *place) in enumerate(rows[:room]):
            expected[tuple(place)] = row
        assert torch.equal(placed.targets, expected)
        of_experts = [expert % LOCAL for expert, *_ in rows[:room]]
        assert placed.num_tokens_per_expert.tolist() == [of_experts.count(e) for e in range(LOCAL)]
        assert placed.most_rows == counts.unflatten(1, (RANKS, LOCAL)).sum((0, 2)).max()


def test_room_is_never_more_than_can_come():
    sizes = [Sizes(4, 100, 6, 8, num_experts, 2.0).num_rows for num_experts in (4, 8, 64)]
    assert sizes == [400, 800, 1200]  # of one expert a rank, two, sixteen


class OneRank:
    """Memory of a rank alone, which tells when it would have waited for others."""

    def __init__(self, num_bytes):
        self.rank, self.buffers, self.seen = 0, [torch.zeros(num_bytes, dtype=torch.uint8)], []

    def barrier(self):
        self.seen.append("barrier")


def test_the_same_kind_twice_in_a_row_waits_for_readers_of_the_first():
    exchange = PeerExchange(Sizes(1, 4, 2, 8, 4, 1.0), torch.float32, OneRank)
    seen = exchange.memory.seen
    ids = torch.tensor([[0, 1], [3, 2], [1, 0]])
    placement = exchange.place(ids)
    rows, scores = exchange.to_rows(torch.randn(3, 8), torch.rand(3, 2), placement.targets)
    exchange.to_tokens(rows, scores, placement.targets, 3)
    assert len(seen) == 3
    exchange.to_tokens(rows, None, placement.targets, 3)
    assert len(seen) == 5
    exchange.to_rows(torch.randn(3, 8), None, placement.targets)
    assert len(seen) == 6
    with pytest.raises(ValueError, match="5 tokens at a time; symmetric memory was set up for 4"):
        exchange.place(ids.repeat(2, 1)[:5])


def peer(*shape):
    tensors = tuple(torch.randn(shape) for _ in range(RANKS))
    return PeerTensor(tensors, torch.tensor([tensor.data_ptr() for tensor in tensors]))


def test_what_is_pulled_can_be_pushed_back():
    choices, counts = choices_of_all((5, 3, 4))
    tokens, scores = peer(TOKENS, 8), peer(TOKENS, TOP_K)
    back, scores_back = peer(TOKENS, TOP_K, 8), peer(TOKENS, TOP_K)
    for rank in range(RANKS):
        targets = place_rows(choices, counts, rank, 100).targets
        rows, row_scores = pull(tokens, scores, targets, 100)
        push(rows, row_scores, targets, back, scores_back)
    for rank, number in enumerate((5, 3, 4)):
        expected = tokens.of_rank[rank][:number].unsqueeze(1).expand(-1, TOP_K, -1)
        assert torch.equal(back.of_rank[rank][:number], expected)
        assert torch.equal(scores_back.of_rank[rank][:number], scores.of_rank[rank][:number])
