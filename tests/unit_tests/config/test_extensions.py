"""job.custom_config_module: a user's keys beside ours, and upstream's modules by name."""

from pathlib import Path

import pytest

from torchtitan.config.checks import check_config
from torchtitan.config.extensions import UPSTREAM_PARTS
from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.config.schema import JobConfig
from torchtitan.config.toml_file import save_toml

MODULE = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Training:
    curriculum: str | None = None
    steps: int = 77

@dataclass
class Loader:
    ring: int = 3

@dataclass
class Validation:
    dataloader: Loader = field(default_factory=Loader)

@dataclass
class Mine:
    names: list[str] = field(default_factory=lambda: ["a"])

@dataclass
class JobConfig:
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    mine: Mine = field(default_factory=Mine)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch) -> str:
    """An importable module with the extension above; its name is new for every test."""
    name = f"extension_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_an_extension_is_merged_field_by_field(module):
    config = load_config(["--job.custom_config_module", module])
    assert isinstance(config, JobConfig)
    assert config.training.curriculum is None
    assert config.training.seq_len == JobConfig().training.seq_len
    assert config.training.steps == 77, "the extension wins"
    assert config.validation.dataloader.ring == 3
    assert config.validation.dataloader.num_workers == 0
    assert config.mine.names == ["a"]
    assert check_config(config) == []


def test_its_keys_come_from_file_and_command_line(module, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'[job]\ncustom_config_module = "{module}"\n[training]\ncurriculum = "easy"\n'
        "[validation.dataloader]\nring = 5\n"
    )
    argv = ["--job.config_file", str(tmp_path / "run.toml"), "--mine.names", "b,c"]
    config = load_config(argv)
    assert config.training.curriculum == "easy"
    assert config.validation.dataloader.ring == 5
    assert config.mine.names == ["b", "c"]
    save_toml(config, tmp_path / "config.toml")
    again = load_config(["--job.config_file", str(tmp_path / "config.toml")])
    assert (again.training, again.mine) == (config.training, config.mine)


def test_its_keys_are_as_strict_as_ours(module, tmp_path):
    (tmp_path / "run.toml").write_text("[mine]\nnamse = []\n[training]\ncurriculum = 4")
    with pytest.raises(ConfigError) as error:
        load_config(
            ["--job.config_file", str(tmp_path / "run.toml"), "--job.custom_config_module", module]
        )
    assert [fault.setting for fault in error.value.faults] == ["mine.namse", "training.curriculum"]
    assert error.value.faults[0].remedy == "Did you mean mine.names?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("JobConfig = 3", "has no dataclass JobConfig."),
        ("import no_such_module", "cannot be imported"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass JobConfig:\n    mine: int",
            "cannot extend the configuration",
        ),
        ("import os\nx = 1 / 0\n", r"fails: ZeroDivisionError: division by zero \(.*broken_.*\.py:2\)"),
    ],
)
def test_modules_that_cannot_extend_are_refused(text, reason, tmp_path, monkeypatch):
    name = f"broken_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        load_config(["--job.custom_config_module", name])


@pytest.mark.parametrize("module", UPSTREAM_PARTS)
def test_upstreams_modules_load_by_name_and_are_refused_by_name(module, tmp_path):
    lines = [f'[job]\ncustom_config_module = "{module}"']
    for section, keys in UPSTREAM_PARTS[module].items():
        lines.append(f"[{section}]")
        lines += [
            f"{key} = {str(value).lower()}" for key, value in keys.items() if type(value) is bool
        ]
        lines += [f'{key} = "x"' for key, value in keys.items() if value is None or value == ""]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    config = load_config(["--job.config_file", str(tmp_path / "run.toml")])
    for section, keys in UPSTREAM_PARTS[module].items():
        assert all(hasattr(getattr(config, section), key) for key in keys)
    assert [fault.setting for fault in check_config(config)] == ["job.custom_config_module"]


def test_the_transformers_section_needs_no_module(tmp_path):
    (tmp_path / "run.toml").write_text('[hf_transformers]\nmodel = "Qwen/Qwen3-4B"')
    config = load_config(["--job.config_file", str(tmp_path / "run.toml")])
    assert config.hf_transformers.model == "Qwen/Qwen3-4B"
    assert [fault.setting for fault in check_config(config)] == ["hf_transformers.model"]
