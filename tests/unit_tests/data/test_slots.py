"""The same global batches on any number of ranks and workers, through any stops."""

import random
from dataclasses import replace

import pytest

from tests.unit_tests.data.helpers import loaders, run, texts, write_lines, write_numbered
from torchtitan.config.faults import ConfigError
from torchtitan.data.batch import batch_hash
from torchtitan.data.loader import DataConfig

STEPS = 24


@pytest.fixture
def config(tmp_path):
    """Two sources of which the slots go through three epochs and more in STEPS batches."""
    write_lines(tmp_path / "a.jsonl", texts(50, longest=15, seed=1))
    write_lines(tmp_path / "b.jsonl", texts(30, longest=9, seed=2))
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "weight": 2},
        {"path": str(tmp_path / "b.jsonl")},
    ]
    return DataConfig(sources, num_slots=12, seq_len=32, seed=5)


@pytest.fixture
def uninterrupted(config):
    hashes, states = run(config, STEPS)
    assert all(source["epoch"] >= 3 for state in states.values() for source in state["sources"])
    assert len(set(hashes)) == STEPS
    return hashes, states


@pytest.mark.parametrize(
    "num_ranks, num_workers", [(1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (1, 3), (3, 3)]
)
def test_ranks_and_workers_change_nothing(config, uninterrupted, num_ranks, num_workers):
    assert run(config, STEPS, num_ranks, num_workers) == uninterrupted


@pytest.mark.parametrize("seed", range(3))
def test_two_stops_on_other_ranks_and_workers_change_nothing(config, uninterrupted, seed):
    draw = random.Random(seed)
    stops = sorted(draw.sample(range(1, STEPS), 2))
    hashes, states = [], None
    for steps in (stops[0], stops[1] - stops[0], STEPS - stops[1]):
        num_ranks, num_workers = draw.choice([1, 2, 3, 4]), draw.choice([0, 1, 3])
        more, states = run(config, steps, num_ranks, num_workers, states)
        hashes += more
    assert (hashes, states) == uninterrupted


def test_stop_at_every_step_of_one_pass(config):
    config = replace(config, repeat=False)
    expected, states = run(config, STEPS, num_ranks=2)
    hashes, states = [], None
    for _ in range(STEPS):
        more, states = run(config, 1, num_ranks=1, states=states)
        hashes += more
    assert hashes == expected
    assert expected[-1] == expected[-2] != expected[0]  # the pass had ended


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    documents = write_numbered(tmp_path / "a.bin", [8] * 40)
    config = DataConfig(str(tmp_path / "a.bin"), num_slots=1, seq_len=8, seed=0)

    def orders(config, num_epochs):
        (loader,) = loaders(config)
        firsts = [next(loader).tokens[0, 0].item() for _ in range(40 * num_epochs)]
        return [firsts[at : at + 40] for at in range(0, len(firsts), 40)]

    shuffled = [*orders(config, 3), *orders(replace(config, seed=1), 1)]
    in_order = [document[0] for document in documents]
    assert all(sorted(order) == in_order for order in shuffled)
    assert len({tuple(order) for order in [*shuffled, in_order]}) == 5
    assert orders(replace(config, shuffle=False), 2) == [in_order, in_order]


def test_restart_goes_back_to_where_the_loader_began(config):
    _, states = run(config, 3)
    for num_workers, persistent in ((0, False), (2, False), (2, True)):
        (loader,) = loaders(replace(config, persistent_workers=persistent), 1, num_workers)
        loader.load_state_dict(states)
        first = [batch_hash(next(loader)) for _ in range(4)]
        loader.restart()
        assert loader.state_dict() == states
        assert [batch_hash(next(loader)) for _ in range(4)] == first


def test_batches_read_ahead_are_not_counted(config):
    config = replace(config, prefetch_factor=4)
    assert run(config, 5, num_workers=2) == run(replace(config, prefetch_factor=None), 5)


def test_state_of_another_global_batch_is_refused(config):
    _, states = run(config, 1)
    (loader,) = loaders(replace(config, num_slots=6))
    with pytest.raises(ConfigError, match="Resume with training.global_batch_size = 12"):
        loader.load_state_dict(states)
    (loader,) = loaders(replace(config, dataset=config.dataset[:1]))
    with pytest.raises(ConfigError, match="names 1 sources, the checkpoint was made with 2"):
        loader.load_state_dict(states)
