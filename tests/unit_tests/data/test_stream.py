"""Streams of shards keep the promises of indexed files: every document once, the same on resume."""

import pytest

from tests.unit_tests.data.helpers import texts
from torchtitan.data.source import BadDocument, Dealing
from torchtitan.data.stream import StreamedSource


def shards_of(count, documents=7):
    return [
        lambda shard=shard: iter([f"{shard}/{number}" for number in range(documents + shard)])
        for shard in range(count)
    ]


def source_of(num_shards, num_slots, shuffle=True, seed=0):
    return StreamedSource(
        "s", shards_of(num_shards), key=0, dealing=Dealing(num_slots, seed, shuffle)
    )


def read_epoch(source, slot, epoch):
    documents = []
    while (document := source.read(slot, epoch, len(documents))) is not None:
        documents.append(document)
    return documents


@pytest.mark.parametrize("num_shards, num_slots", [(1, 1), (8, 3), (3, 3), (4, 3), (2, 3), (1, 5)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_slots_share_each_epoch_without_loss(num_shards, num_slots, shuffle):
    source = source_of(num_shards, num_slots, shuffle)
    everything = sorted(document for shard in shards_of(num_shards) for document in shard())
    for epoch in range(2):
        slots = [read_epoch(source, slot, epoch) for slot in range(num_slots)]
        assert sorted(document for documents in slots for document in documents) == everything


def test_slots_read_shards_of_their_own():
    source = source_of(num_shards=7, num_slots=3)
    shards = [
        {document.split("/")[0] for document in read_epoch(source, slot, 0)} for slot in range(3)
    ]
    assert shards == [{"0", "3", "6"}, {"1", "4"}, {"2", "5"}]


@pytest.mark.parametrize("num_shards", [2, 6])
def test_any_place_is_found_again(num_shards):
    source = source_of(num_shards, num_slots=3)
    for epoch in (0, 1):
        documents = read_epoch(source, 1, epoch)
        for index in (0, 3, len(documents) - 1, 1):
            fresh = source_of(num_shards, num_slots=3)
            assert fresh.read(1, epoch, index) == documents[index]
            assert source.read(1, epoch, index) == documents[index]  # jumping about


def test_orders_differ_by_epoch_and_seed():
    orders = [
        read_epoch(source_of(6, 2, seed=seed), 0, epoch) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(map(tuple, orders))) == 4
    in_order = [document for shard in shards_of(6)[::2] for document in shard()]
    assert read_epoch(source_of(6, 2, shuffle=False), 0, 0) == in_order


def test_a_single_document_reaches_every_slot_in_some_epoch():
    source = StreamedSource("s", [lambda: iter(["one"])], key=0, dealing=Dealing(4, 0, True))
    for slot in range(4):
        assert [len(read_epoch(source, slot, epoch)) for epoch in range(4)].count(1) == 1


def test_bad_documents_keep_their_place():
    documents = [*texts(3), BadDocument("shard 0, row 4", "no text"), *texts(2)]
    source = StreamedSource("s", [lambda: iter(documents)], key=0, dealing=Dealing(1, 0, False))
    with pytest.raises(BadDocument, match="row 4"):
        source.read(0, 0, 3)
    assert source.read(0, 0, 4) == documents[4]
