"""Finds a model family and flavor by name; a family is a module with a FLAVORS table."""

import importlib
import pkgutil
from dataclasses import fields, is_dataclass, replace
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torchtitan import models
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.names import did_you_mean
from torchtitan.models.hf_format import HFFormat


def families() -> list[str]:
    """The families in this package: its modules that have a FLAVORS table."""
    names = [module.name for module in pkgutil.iter_modules(models.__path__)]
    return [name for name in names if hasattr(_module(name), "FLAVORS")]


def model_config(name: str, flavor: str, overrides: dict[str, Any]) -> Any:
    """The frozen config of `name`'s flavor with `overrides` applied.

    `name` is a family of this package, or the dotted path of a module elsewhere. Raises ConfigError.
    """
    flavors = _flavors(name)
    if flavor not in flavors:
        raise ConfigError([_unknown("model.flavor", flavor, list(flavors))])
    return _override(flavors[flavor], overrides, "model.overrides")


def hf_formats(name: str | None = None) -> tuple[HFFormat, ...]:
    """What Hugging Face calls a family's config fields and tensors; of all families without a name.

    Raises ConfigError where nothing of the kind is known of the family.
    """
    if name is None:
        return sum((getattr(_module(family), "HF_FORMATS", ()) for family in families()), ())
    formats = getattr(_module(name), "HF_FORMATS", ())
    if not formats:
        remedy = "A family's module says it in HF_FORMATS; see docs/adding_a_model.md."
        reason = "nothing says what Hugging Face calls this family's tensors."
        raise ConfigError([Fault("model.name", reason, remedy, name)])
    return formats


def _module(name: str) -> ModuleType:
    return importlib.import_module(_path(name))


def _path(name: str) -> str:
    return name if "." in name else f"{models.__name__}.{name}"


def _flavors(name: str) -> dict[str, Any]:
    try:
        return _module(name).FLAVORS
    except (ImportError, AttributeError) as error:
        missing = f"{error.name}." if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{_path(name)}.".startswith(missing):  # itself or a package it is in
            raise ConfigError([_unknown("model.name", name, families())]) from None
        remedy = "See docs/adding_a_model.md."
        raise ConfigError([Fault("model.name", f"cannot be used: {error}.", remedy, name)]) from error


def _override(config: Any, overrides: dict[str, Any], path: str) -> Any:
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    set_by = {field.name: field.metadata.get("set_by") for field in fields(config)}
    types = get_type_hints(type(config))
    changes, faults = {}, []
    for key, value in overrides.items():
        if key not in known:
            faults.append(_unknown(path, key, [name for name in known if not set_by[name]]))
        elif set_by[key]:
            reason = f"{set_by[key]} sets it in every run."
            faults.append(Fault(f"{path}.{key}", reason, f"Write {set_by[key]}.", value))
        elif is_dataclass(known[key]) and isinstance(value, dict):
            changes[key] = _override(known[key], value, f"{path}.{key}")
        elif (
            fault := _type_fault(f"{path}.{key}", types[key], known[key], value)
        ) is not None:
            faults.append(fault)
        else:
            changes[key] = value
    if faults:
        raise ConfigError(faults)
    return replace(config, **changes)


def _type_fault(path: str, declared: Any, present: Any, value: Any) -> Fault | None:
    if get_origin(declared) is Literal:
        choices = list(get_args(declared))
        return None if value in choices else _unknown(path, value, choices)
    if present is None:
        return Fault(path, "is a part that this flavor does not have.", value=value)
    accepted = (int, float) if isinstance(present, float) else type(present)
    if isinstance(value, accepted) and isinstance(value, bool) == isinstance(present, bool):
        return None
    return Fault(path, f"must be of type {type(present).__name__}.", value=value)


def _unknown(setting: str, value: Any, known: list[str]) -> Fault:
    remedy = f"{did_you_mean(str(value), known)} Known: {', '.join(known)}.".lstrip()
    return Fault(setting, "no such name.", remedy, value=value)
