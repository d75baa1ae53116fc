"""Which parameters have settings of their own? The tables of optimizer.groups, read and checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.names import unknown_key
from torchtitan.config.schema import Optimizer
from torchtitan.config.values import expected, fits, key_types, unquoted

KEY = "optimizer.groups"


@dataclass(frozen=True)
class OptimizerGroup:
    """Settings of the parameters whose names match one of `patterns`, and no table before."""

    patterns: str | list[str]
    lr_scale: float = 1.0
    """Times the scheduled learning rate; 0 leaves the parameters as they are."""
    weight_decay: float | None = None
    """In place of optimizer.weight_decay and no_decay."""
    optimizer: Literal["AdamW", "Muon"] | None = None
    """Which of the two updates them where optimizer.name is Muon; unset, names and shapes say."""


def read_groups(config: Optimizer) -> list[OptimizerGroup]:
    """The tables in order; raises ConfigError with everything that is wrong with them."""
    tables = enumerate(config.groups)
    faults = [fault for n, table in tables for fault in _faults(table, f"{KEY}[{n}]")]
    if faults:
        raise ConfigError(faults)
    return [
        OptimizerGroup(**table | {"patterns": _as_list(table["patterns"])}) for table in config.groups
    ]


def _faults(table: Mapping[str, Any], where: str) -> Iterator[Fault]:
    kinds = key_types(OptimizerGroup)
    for key, value in table.items():
        if key not in kinds:
            yield unknown_key(where, key, value, "a group", kinds)
        elif not fits(value, kinds[key]):
            reason = f"expects {expected(kinds[key]).removesuffix(' or None')}."
            yield Fault(f"{where}.{key}", reason, unquoted(value, kinds[key]), value)
        elif key in ("lr_scale", "weight_decay") and not value >= 0:
            yield Fault(f"{where}.{key}", "must be at least 0.", value=value)
    if not table.get("patterns"):
        yield Fault(where, "matches nothing.", 'Give patterns, as in patterns = ["*norm*"].', dict(table))
    elif table.keys() == {"patterns"}:
        others = ", ".join(key for key in kinds if key != "patterns")
        yield Fault(where, "sets nothing.", f"Give one of {others}.", dict(table))


def _as_list(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns
