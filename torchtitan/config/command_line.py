"""What does the command line say? tyro reads it against the schema; mistakes become faults.

Options are `--section.key value` or `--section.key=value`, with hyphens or underscores; flags are
`--section.key` and `--section.no-key`. Values of a list are split at commas and spaces.
"""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tomli
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from torchtitan.config.faults import Fault
from torchtitan.config.names import leaf_keys, suggest
from torchtitan.config.values import expected, key_types

SOURCE = "command line"


@dataclass(frozen=True)
class Option:
    """One option as typed: its key with underscores, and its words, of which the first names it."""

    key: str
    words: tuple[str, ...]

    @property
    def values(self) -> list[str]:
        """What was given with it, after spaces or after the equals sign."""
        _, equals, value = self.words[0].partition("=")
        return ([value] if equals else []) + list(self.words[1:])


def split_options(argv: Sequence[str]) -> list[Option]:
    """The command line, cut where a word begins with two hyphens."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or word == "-h" or not groups:
            groups.append([])
        groups[-1].append(word)
    return [Option(_key(words[0]), tuple(words)) for words in groups]


def last_value(options: Sequence[Option], key: str) -> str | None:
    """The value an option was last given; None where it was not."""
    given = [option.values[0] for option in options if option.key == key and option.values]
    return given[-1] if given else None


def merge_options(config: Any, options: Sequence[Option]) -> tuple[Any, list[Fault]]:
    """The config with the options' values in place; where one cannot be used, why not.

    `--help` prints all keys, with the given config's values as defaults, and exits.
    """
    if any(option.words[0] in ("-h", "--help") for option in options):
        _parse(config, ["--help"])
    known = leaf_keys(config)
    tables = [key for key, value in known.items() if isinstance(value, dict)]
    faults: list[Fault] = []
    typed: list[Option] = []
    for option in options:
        if not option.words[0].startswith("--"):
            faults.append(_unknown(option, known))
        elif any(option.key.startswith(f"{table}.") for table in tables):
            if len(option.values) == 1:
                value = _toml_value(option.values[0])
                config = _with_entry(config, option.key.split("."), value)
            else:
                faults.append(Fault(option.key, "needs one value.", source=SOURCE))
        elif key_of(option, known) in known:
            typed.append(option)
        else:
            faults.append(_unknown(option, known))
    parsed = _parse(config, [word for option in typed for word in option.words])
    if parsed is not None:
        return parsed, faults
    wrong = [option for option in typed if _is_wrong(option, config)]
    assert wrong, f"each option parses by itself but not all together: {typed}"
    return config, faults + [_wrong_value(option, config) for option in wrong]


def key_of(option: Option, known: dict[str, Any]) -> str:
    """The key an option sets: its own name, or for --section.no-key that of the flag it clears."""
    section, _, name = option.key.rpartition(".")
    cleared = f"{section}.{name.removeprefix('no_')}"
    is_flag = option.key not in known and isinstance(known.get(cleared), bool)
    return cleared if is_flag else option.key


def _parse(config: Any, words: Sequence[str]) -> Any:
    """What tyro makes of the words; None where it refuses them, whatever it would print."""
    helps = "--help" in words
    with contextlib.nullcontext() if helps else contextlib.redirect_stderr(io.StringIO()):
        try:
            return tyro.cli(
                type(config),
                prog="./run_train.sh",
                description=_HELP,
                args=list(words),
                default=config,
                use_underscores=True,
                registry=_GRAMMAR,
            )
        except SystemExit:
            if helps:
                raise
            return None


def _with_entry(base: Any, path: Sequence[str], value: Any) -> Any:
    """A config, or a table in it, with the entry at a path of names set."""
    if not path:
        return value
    name, *rest = path
    if dataclasses.is_dataclass(base):
        inner = _with_entry(getattr(base, name), rest, value)
        return dataclasses.replace(base, **{name: inner})
    table = base if isinstance(base, dict) else {}
    return table | {name: _with_entry(table.get(name), rest, value)}


def _toml_value(word: str) -> Any:
    """A word read as TOML would: 4, 1e-5, true, [1, 2]; anything else is text."""
    try:
        return tomli.loads(f"value = {word}")["value"]
    except tomli.TOMLDecodeError:
        return word


def _unknown(option: Option, known: dict[str, Any]) -> Fault:
    typed = option.words[0].partition("=")[0]
    if not typed.startswith("--"):
        remedy = f"Did you mean --{typed}? " if option.key in known else ""
        remedy += "Options are --section.key value; text with spaces needs quotes."
        return Fault(typed, "belongs to no option.", remedy, source=SOURCE)
    return Fault(typed, "no such option.", suggest(option.key, known), source=SOURCE)


def _is_wrong(option: Option, config: Any) -> bool:
    key = key_of(option, leaf_keys(config))
    flag_with_value = _kind_of(key, type(config)) is bool and bool(option.values)
    return flag_with_value or _parse(config, option.words) is None


def _wrong_value(option: Option, config: Any) -> Fault:
    key = key_of(option, leaf_keys(config))
    kind = _kind_of(key, type(config))
    section, _, name = key.rpartition(".")
    value, remedy = " ".join(option.values), ""
    if kind is bool:
        reason = "is a flag and takes no value."
        remedy = f"Write --{key}, or --{section}.no_{name}."
    elif not option.values:
        reason = f"needs a value: {expected(kind)}."
    elif len(option.values) > 1:
        reason = f"takes one value, {expected(kind)}."
        remedy = "Text with spaces needs quotes."
    else:
        reason = f"expects {expected(kind)}."
    return Fault(key, reason, remedy, value or None, SOURCE)


def _kind_of(key: str, schema: Any) -> Any:
    for name in key.split("."):
        schema = key_types(schema)[name]
    return schema


def _key(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


_HELP = """Train a model.

Every key can stand in the TOML file that --job.config_file names, under its [section], and on the
command line, which wins. The defaults shown are the file's where one is given. A list takes values
split by commas or spaces; --section.no_flag clears a flag; hyphens and underscores are the same.
docs/configuration.md has the details."""

_GRAMMAR = ConstructorRegistry()


@_GRAMMAR.primitive_rule
def _strings(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """list[str]: `a,b` and `a b` are the same."""
    if info.type not in (list[str], list[str] | str):
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="STR[,STR...]",
        instance_from_str=lambda words: [item for word in words for item in word.split(",")],
        is_instance=lambda value: isinstance(value, (list, str)),
        str_from_instance=lambda value: [value if isinstance(value, str) else ",".join(value)],
    )


@_GRAMMAR.primitive_rule
def _lists_of_strings(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """list[list[str]] | None: a word for each inner list, split at commas."""
    if info.type != list[list[str]] | None:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="{None}|STR[,STR...] ...",
        instance_from_str=lambda words: (
            None if words == ["None"] else [word.split(",") for word in words]
        ),
        is_instance=lambda value: value is None or isinstance(value, list),
        str_from_instance=lambda lists: (
            ["None"] if lists is None else [",".join(inner) for inner in lists]
        ),
    )


@_GRAMMAR.primitive_rule
def _tables(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Tables, and a string or tables, in one word of TOML: `{path = "a.jsonl", weight = 2}`."""
    takes_string = info.type == str | dict[str, Any] | list[dict[str, Any]]
    is_list = info.type == list[dict[str, Any]]
    if not takes_string and not is_list and info.type != dict[str, Any]:
        return None

    def parse(words: list[str]) -> Any:
        if is_list and words in ([], ["[]"]):
            return []
        if len(words) != 1:
            raise ValueError("not one word")
        is_toml = words[0].startswith(("{", "[{"))
        if not is_toml and not takes_string:
            raise ValueError("not a table")
        return tomli.loads(f"value = {words[0]}")["value"] if is_toml else words[0]

    return PrimitiveConstructorSpec(
        nargs="*" if is_list else 1,
        metavar="STR|{TOML}" if takes_string else "{TOML}",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, (str, dict, list)),
        str_from_instance=lambda value: [str(value)],
    )
