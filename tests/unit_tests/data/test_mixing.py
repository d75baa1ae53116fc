"""Weights are shares of tokens, in every slot and in every batch, however long documents are."""

import random

import pytest

from tests.unit_tests.data.helpers import loaders, run, until_exhausted, write_numbered
from torchtitan.data.loader import DataConfig
from torchtitan.data.slots import _source_of_turn


def sources_of(tmp_path, weights, lengths, documents=50):
    """Sources of which number k holds only tokens from 100 k to 100 k + 99, in documents of about lengths[k]."""
    draw = random.Random(0)
    tables = []
    for k, (weight, length) in enumerate(zip(weights, lengths)):
        path = tmp_path / f"{k}.bin"
        pieces = [draw.randint(1, length) for _ in range(documents)]
        write_numbered(path, pieces, first=100 * k, wrap=100)
        tables.append({"path": str(path), "weight": weight})
    return tables


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (9, 1), (1, 1, 1)])
@pytest.mark.parametrize("num_slots", [8, 64])
def test_mix_is_within_half_a_percent_after_a_million_tokens(tmp_path, weights, num_slots):
    config = DataConfig(
        sources_of(tmp_path, weights, [200, 5000, 1000]), num_slots=num_slots, seq_len=2048, seed=0
    )
    (loader,) = loaders(config)
    counts = [0] * len(weights)
    for _ in range(-(-1_000_000 // (num_slots * 2048))):
        kinds = next(loader).tokens // 100
        counts = [count + (kinds == k).sum().item() for k, count in enumerate(counts)]
    for count, weight in zip(counts, weights):
        assert abs(count / sum(counts) - weight / sum(weights)) < 0.005


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (0.97, 0.02, 0.01), (1, 2, 3, 4)])
def test_every_slot_keeps_within_two_sequences_of_the_weights(weights):
    for phases in ([0.1, 0.9, 0.4], [0.99, 0.01, 0.5]):
        counts = [0] * len(weights)
        for turn in range(2000):
            counts[_source_of_turn(turn, weights, phases)] += 1
            shares = [(turn + 1) * weight / sum(weights) for weight in weights]
            assert all(abs(count - share) < 2 for count, share in zip(counts, shares))


def test_one_pass_reads_every_source_to_its_end(tmp_path):
    tables = sources_of(tmp_path, (1, 100), (10, 200))
    config = DataConfig(tables, num_slots=3, seq_len=64, seed=0, repeat=False)
    batches = until_exhausted(loaders(config)[0])
    alone = [
        sum(
            batch.num_valid_tokens
            for batch in until_exhausted(
                loaders(DataConfig(table, num_slots=3, seq_len=64, seed=0, repeat=False))[0]
            )
        )
        for table in tables
    ]
    assert sum(batch.num_valid_tokens for batch in batches) == sum(alone)


def test_sources_go_through_epochs_of_their_own(tmp_path):
    tables = sources_of(tmp_path, (1, 1), (10, 1000))
    _, states = run(DataConfig(tables, num_slots=2, seq_len=256, seed=0), steps=20)
    small, large = states["0"]["sources"]
    assert small["epoch"] > 10 and large["epoch"] < 2
