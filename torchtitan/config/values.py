"""Which values may a key have? The types of the schema, checked and put in words."""

import types
import typing
from typing import Any, Literal, Union

import tomli


def key_types(schema: type) -> dict[str, Any]:
    """Type of each field of a dataclass, annotations in quotes resolved."""
    return typing.get_type_hints(schema)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value, as TOML gives it, is of a key's type. Whole numbers pass for floats."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if is_union(kind):
        return any(fits(value, member) for member in inner)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict or kind is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (float, int)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if kind is types.NoneType else isinstance(value, kind)


def coerce(value: Any, kind: Any) -> Any:
    """A fitting value as the command line would have made it: 1 is 1.0 where floats are meant."""
    if is_union(kind):
        members = [member for member in typing.get_args(kind) if member is not types.NoneType]
        return coerce(value, members[0]) if len(members) == 1 and value is not None else value
    return float(value) if kind is float else value


def expected(kind: Any) -> str:
    """What a key takes, as in `expects an integer`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_union(kind):
        return " or ".join(dict.fromkeys(expected(member) for member in inner))
    if origin is Literal:
        choices = [f'"{choice}"' for choice in inner]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is list:
        return f"a list of {_PLURALS.get(inner[0]) or expected(inner[0]) + 's'}"
    if origin is dict or kind is dict:
        return "a table"
    return _WORDS.get(kind) or getattr(kind, "__name__", str(kind))


def unquoted(value: Any, kind: Any) -> str:
    """Advice for a number or flag that was written as text; empty for anything else."""
    if not isinstance(value, str):
        return ""
    try:
        meant = tomli.loads(f"value = {value}")["value"]
    except tomli.TOMLDecodeError:
        return ""
    return f"Write it without quotes: {value}." if fits(meant, kind) else ""


def is_optional(kind: Any) -> bool:
    """Whether None is one of the values."""
    return is_union(kind) and types.NoneType in typing.get_args(kind)


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    types.NoneType: "None",
}
_PLURALS = {str: "strings", list[str]: "lists of strings", dict[str, Any]: "tables"}
