"""What a run settles when it starts."""

import json
from dataclasses import asdict

import pytest

from torchtitan.config.schema import Training
from torchtitan.run_record import moved_data


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (Training(dataset="c4_test"), Training(dataset="c4_test"), ""),
        (Training(dataset="a.txt"), Training(dataset="b.txt"), "one in a.txt, and this run reads b.txt"),
        (
            Training(dataset="c4_test", dataset_path="/old"),
            Training(dataset="c4_test", dataset_path="/new"),
            "one in c4_test at /old, and this run reads c4_test at /new",
        ),
        (Training(dataset=[{"path": "a"}]), Training(dataset=[{"path": "a"}]), ""),
        (
            Training(dataset=[{"path": "a"}, {"path": "b", "weight": 2}]),
            Training(dataset="c4_test"),
            "one in [{'path': 'a'}, {'path': 'b', 'weight': 2}], and this run reads c4_test",
        ),
    ],
)
def test_a_position_in_other_data_is_warned_of(before, now, said):
    warning = moved_data(now, json.loads(json.dumps(asdict(before))))
    assert said in warning and bool(warning) == bool(said)
