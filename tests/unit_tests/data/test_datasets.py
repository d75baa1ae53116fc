"""What the dataset setting may say, and what is answered when it says something else."""

import sys

import pytest

from tests.unit_tests.data.helpers import loaders, write_lines
from torchtitan.config.faults import ConfigError
from torchtitan.data.datasets import REGISTERED, SourceSpec, parse_dataset
from torchtitan.data.loader import DataConfig


def test_registered_names_stand_for_their_sources():
    assert parse_dataset("c4") == [SourceSpec(name="allenai/c4", subset="en")]
    assert parse_dataset("c4_validation")[0].split == "validation"
    assert parse_dataset({"name": "c4_test", "weight": 3})[0].path == REGISTERED["c4_test"].path


def test_dataset_path_takes_the_place_of_the_hub(tmp_path):
    assert parse_dataset("c4", "/data/c4")[0].path == "/data/c4"
    write_lines(tmp_path / "c4-train.00000-of-01024.json", ["some text"])
    (loader,) = loaders(DataConfig("c4", 1, 8, seed=0, dataset_path=str(tmp_path)))
    assert next(loader).num_valid_tokens


def test_a_dataset_path_without_files_is_named(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ConfigError) as error:
        loaders(DataConfig("c4_test", 1, 8, seed=0, dataset_path=missing))
    assert f'training.dataset_path = "{missing}": no file' in str(error.value)


def test_a_path_needs_no_table(tmp_path):
    path = str(write_lines(tmp_path / "a.jsonl", ["some text"]))
    assert parse_dataset(path) == [SourceSpec(path=path)]


@pytest.mark.parametrize(
    "dataset, dataset_path, messages",
    [
        ("c4_tset", None, ['Did you mean "c4_test"?', "c4_validation"]),
        ("no/such/file.jsonl", None, ["neither a registered dataset nor files that exist"]),
        ([], None, ["names no source"]),
        ([{"path": "a"}], "/data", ["training.dataset_path", "/data"]),
        (
            [{"path": "a", "wieght": 1}],
            None,
            ["training.dataset[0].wieght", "Did you mean weight?"],
        ),
        (
            [{"path": "a"}, {"path": "a", "weight": 0}],
            None,
            ["dataset[1].weight = 0", "above zero"],
        ),
        ([{"path": "a", "weight": True}], None, ["above zero"]),
        ([{"path": "a", "weight": "2"}], None, ["above zero"]),
        ({"path": "a", "name": "b"}, None, ["either a path or a name"]),
        ({"weight": 1.0}, None, ["either a path or a name"]),
        ({"path": 3}, None, ["training.dataset.path = 3", "must be a string"]),
        ({"path": ""}, None, ['training.dataset.path = "": is empty']),
        (["a"], None, ["a source is a table"]),
        ([{"path": "a", "x": 1}, {"y": 2}], None, ["[0].x", "[1].y", "either a path or a name"]),
    ],
)
def test_mistakes_are_answered_all_at_once(dataset, dataset_path, messages):
    with pytest.raises(ConfigError) as error:
        parse_dataset(dataset, dataset_path)
    for message in messages:
        assert message in str(error.value)


def test_the_hub_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'torchtitan\[datasets\]'"):
        loaders(DataConfig("c4_validation", 1, 8, seed=0, section="validation"))
