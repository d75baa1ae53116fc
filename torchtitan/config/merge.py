"""How do a TOML file's tables become a config? Each key is looked up, type-checked and merged."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torchtitan.config.faults import Fault
from torchtitan.config.names import leaf_keys, nearest, present_name, suggest
from torchtitan.config.toml_file import TomlFile
from torchtitan.config.values import coerce, expected, fits, is_optional, key_types, unquoted


def merge_toml(defaults: Any, file: TomlFile) -> tuple[Any, list[Fault]]:
    """The defaults with the file's values in place; where one cannot be used, why not."""
    faults: list[Fault] = []
    known = leaf_keys(defaults)
    return _merge(defaults, file.table, "", file, known, faults), faults


def _merge(
    section: Any, table: dict, prefix: str, file: TomlFile, known: dict, faults: list[Fault]
) -> Any:
    kinds = key_types(type(section))
    values: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in kinds:
            faults += _unknown(key, value, file, known)
        elif not dataclasses.is_dataclass(kinds[name]):
            # TOML has no None: the word stands for it, as on the command line.
            value = None if value == "None" and is_optional(kinds[name]) else value
            if fits(value, kinds[name]):
                values[name] = coerce(value, kinds[name])
            else:
                faults.append(_wrong_type(key, value, kinds[name], file))
        elif isinstance(value, dict):
            inner = getattr(section, name)
            values[name] = _merge(inner, value, key + ".", file, known, faults)
        else:
            reason, remedy = "is a section, not a key.", f"Write its keys under [{key}]."
            faults.append(Fault(key, reason, remedy, value, file.source(key)))
    return dataclasses.replace(section, **values)


def _wrong_type(key: str, value: Any, kind: Any, file: TomlFile) -> Fault:
    remedy = unquoted(value, kind)
    return Fault(key, f"expects {expected(kind)}.", remedy, value, file.source(key))


def _unknown(key: str, value: Any, file: TomlFile, known: dict) -> Iterator[Fault]:
    """A fault for an unknown key; for an unknown section one, and one a key that was renamed."""
    if not isinstance(value, dict):
        yield Fault(key, "no such key.", suggest(key, known), source=file.source(key))
        return
    leaves = list(_leaves(value, key))
    old = [leaf for leaf in leaves if present_name(leaf, known)]
    for leaf in old:
        yield Fault(leaf, "no such key.", present_name(leaf, known), source=file.source(leaf))
    if len(old) < len(leaves) or not leaves:
        advice = _suggest_section(key, known)
        yield Fault(f"[{key}]", "no such section.", advice, source=file.source(key))


def _suggest_section(key: str, known: dict) -> str:
    sections = {leaf.rpartition(".")[0] for leaf in known}
    namesakes = sorted(section for section in sections if section.endswith(f".{key}"))
    near = namesakes[0] if namesakes else nearest(key, sections)
    return f"Did you mean [{near}]?" if near else ""


def _leaves(table: dict, prefix: str) -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"
