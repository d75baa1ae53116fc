"""The shuffled order is a permutation, and a different one for every key."""

from collections import Counter

import pytest

from torchtitan.data.permutation import mix, permute


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4095, 4096, 4097])
def test_every_index_comes_exactly_once(size):
    assert sorted(permute(i, size, key=3) for i in range(size)) == list(range(size))


def test_size_of_a_crawled_corpus_needs_no_table():
    size = 10**11 + 3
    places = {permute(i, size, key=1) for i in range(1000)}
    assert len(places) == 1000 and max(places) > size // 2


def test_all_orders_of_few_documents_are_about_equally_likely():
    counts = Counter(tuple(permute(i, 4, mix(0, key)) for i in range(4)) for key in range(4800))
    assert len(counts) == 24
    assert 120 < min(counts.values()) and max(counts.values()) < 300  # 200 expected


def test_order_depends_on_every_part_of_the_key():
    keys = [mix(0, 0, 0), mix(1, 0, 0), mix(0, 1, 0), mix(0, 0, 1)]
    orders = {tuple(permute(i, 50, key) for i in range(50)) for key in keys}
    assert len(orders) == 4


def test_order_never_changes_between_releases():  # or a resumed run would read other documents
    assert [permute(i, 10, key=42) for i in range(10)] == [4, 0, 9, 5, 2, 8, 7, 1, 3, 6]
