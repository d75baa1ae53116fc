"""Values of a config, or of any nested dataclass, by their dotted names."""

from dataclasses import replace
from typing import Any, TypeVar

Config = TypeVar("Config")


def value_at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def with_value(config: Config, key: str, value: Any) -> Config:
    """A config that differs in this value: configs are frozen, at every depth."""
    name, _, rest = key.partition(".")
    return replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})
