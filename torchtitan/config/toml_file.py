"""What does a TOML file say, and on which line? Reading and writing of config files."""

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from torchtitan.config.faults import Fault
from torchtitan.config.schema import JobConfig

TRAIN_CONFIGS = Path(__file__).parents[2] / "train_configs"


@dataclass(frozen=True)
class TomlFile:
    """A file's tables, and the line each of its keys stands on."""

    path: str = ""
    table: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def source(self, key: str) -> str:
        """`file:line` of a key or section, or the file alone where the line is not known."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else self.path


def read_toml(path: str | None) -> tuple[TomlFile, list[Fault]]:
    """The file's content; an empty one, and why, where it cannot be read. None is no file."""
    if path is None:
        return TomlFile(), []
    try:
        text = Path(path).read_bytes().decode()
        return TomlFile(path, tomli.loads(text), _lines_of_keys(text)), []
    except FileNotFoundError:
        fault = Fault("job.config_file", "no such file.", _nearest_config(path), value=path)
    except OSError as error:
        fault = Fault("job.config_file", f"cannot be read: {error.strerror}.", value=path)
    except UnicodeDecodeError as error:
        fault = Fault("job.config_file", f"is not UTF-8 text: {error.reason}.", value=path)
    except tomli.TOMLDecodeError as error:
        fault = Fault("job.config_file", f"is not valid TOML: {error}.", value=path)
    return TomlFile(path), [fault]


def as_table(section: Any) -> dict[str, Any]:
    """A config, or a section of one, as nested tables that read_toml and merge lead back to it.

    TOML knows no None: such keys are left out, or written as the word where the default differs.
    """
    table = {}
    for key in dataclasses.fields(section):
        value = getattr(section, key.name)
        if dataclasses.is_dataclass(value):
            table[key.name] = as_table(value)
        elif value is not None:
            table[key.name] = value
        elif key.default is not None:
            table[key.name] = "None"
    return table


def to_toml(config: JobConfig) -> str:
    """The whole config, defaults included, as the text of a TOML file that loads back to it."""
    return tomli_w.dumps(as_table(config))


def to_json(config: JobConfig) -> str:
    """The whole config as JSON, for logs and job.save_config_file."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def save_toml(config: JobConfig, path: str | Path) -> None:
    """Write the whole config; a run launched from that file has the same one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(config), encoding="utf-8")


def _lines_of_keys(text: str) -> dict[str, int]:
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([\w.-]+)\s*\]", line):
            section = header[1] + "."
            lines.setdefault(header[1], number)
        elif assignment := re.match(r"\s*([\w.-]+)\s*=", line):
            lines.setdefault(section + assignment[1], number)
    return lines


def _nearest_config(path: str) -> str:
    """Advice for a path that does not exist: the most alike of the files that we ship.

    Upstream's torchtitan/models/<family>/train_configs/<family>_<flavor>.toml are answered too.
    """
    shipped = {_family_and_name(file): file for file in sorted(TRAIN_CONFIGS.glob("*/*.toml"))}
    match = difflib.get_close_matches(_family_and_name(Path(path)), shipped, n=1, cutoff=0.5)
    if not match:
        return f"Ready configs are in {_from_here(TRAIN_CONFIGS)}."
    return f"Did you mean {_from_here(shipped[match[0]])}?"


def _family_and_name(file: Path) -> str:
    folders = [part for part in file.parent.parts if part != "train_configs"]
    family = folders[-1] if folders else ""
    return f"{family}/{file.stem.removeprefix(family + '_')}"


def _from_here(path: Path) -> str:
    """The path as one would type it: relative where it lies under the current folder."""
    here = Path.cwd()
    return f"./{path.relative_to(here)}" if path.is_relative_to(here) else str(path)
