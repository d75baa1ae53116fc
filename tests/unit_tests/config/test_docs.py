"""docs/configuration.md says what the code does: its tables, and its example of mistakes."""

import ast
import re
from pathlib import Path

import pytest

from torchtitan.config import schema_parallelism, schema_quantize, schema_run, schema_training
from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.config.names import leaf_keys
from torchtitan.config.not_built import NOT_BUILT
from torchtitan.config.schema import JobConfig

DOCS = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()


def rows(section: str) -> list[list[str]]:
    """Cells of a section's table, for the rows that begin with a key."""
    text = DOCS.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def documented_as_ours() -> list[str]:
    """Names of the keys whose docstring marks them, or values of theirs, as ours."""
    names = []
    for module in (schema_parallelism, schema_quantize, schema_run, schema_training):
        for section in ast.parse(Path(module.__file__).read_text()).body:
            for key, text in zip(getattr(section, "body", []), getattr(section, "body", [])[1:]):
                if isinstance(key, ast.AnnAssign) and "ours" in text.value.value.lower():
                    names.append(key.target.id)
    return names


def test_every_key_of_ours_stands_in_the_table():
    keys = [cells[0].strip("`") for cells in rows("Keys of ours")]
    assert set(keys) <= set(leaf_keys(JobConfig))
    assert sorted(key.rpartition(".")[2] for key in keys) == sorted(documented_as_ours())


def test_everything_that_is_not_built_stands_in_the_table():
    documented = {
        (key, status)
        for keys, status, _ in rows("Not built yet")
        for key in re.findall(r"`([^`]+)`", keys)
    }
    assert documented == {(key, row.status) for row in NOT_BUILT for key in row.switches}


def test_every_family_that_is_not_built_is_named():
    text = " ".join(feature for keys, _, feature in rows("Not built yet") if keys == "`model.name`")
    refused = [row.refused for row in NOT_BUILT if row.switches == ("model.name",)]
    assert set(text.replace("the families", "").replace(",", "").split()) == {*sum(refused, ())}


def test_the_example_of_mistakes_is_real_output(tmp_path, monkeypatch):
    section = DOCS.split("\n## Mistakes\n")[1].split("\n## ")[0]
    (toml,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    (answers,) = re.findall(r"```\n(- .*?)\n```", section, re.DOTALL)
    (line,) = re.findall(r"and `(--.*?)` come", section)
    (tmp_path / "mine.toml").write_text(toml)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config(["--job.config_file", "mine.toml", *line.split()])
    assert str(error.value) == answers
