"""Which sources does a dataset setting name?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.names import did_you_mean, unknown_key
from torchtitan.data.indexed import IndexedSource, find_files, open_files
from torchtitan.data.source import BadDocument, Dealing, Source
from torchtitan.data.stream import StreamedSource, open_hub

_ASSETS = Path(__file__).resolve().parents[2] / "tests" / "assets"
_PROBED = 20  # documents of which one must be usable, or the run is refused


@dataclass(frozen=True)
class SourceSpec:
    """One source of documents, as a table of the dataset setting gives it."""

    path: str | None = None
    """A file, a folder, or a glob pattern of files."""
    name: str | None = None
    """A registered dataset or one of the Hugging Face Hub; with `path`, a name for messages."""
    text_key: str = "text"
    """The key, or column, that holds a document's text."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources' weights."""
    subset: str | None = None
    """Configuration of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""


REGISTERED = {
    "c4": SourceSpec(name="allenai/c4", subset="en"),
    "c4_validation": SourceSpec(name="allenai/c4", subset="en", split="validation"),
    "c4_test": SourceSpec(path=str(_ASSETS / "c4_test")),
    "c4_test_validation": SourceSpec(path=str(_ASSETS / "c4_test_validation")),
}


def parse_dataset(
    dataset: str | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    dataset_path: str | None = None,
    section: str = "training",
) -> list[SourceSpec]:
    """The sources a dataset setting names; ConfigError with every mistake in it."""
    setting = f"{section}.dataset"
    if isinstance(dataset, str):
        return [_named(dataset, dataset_path, section)]
    tables = [dataset] if isinstance(dataset, Mapping) else list(dataset)
    faults = []
    if dataset_path is not None:
        reason = "goes only with a registered dataset."
        remedy = "Give a source's files by the key path of its own table."
        faults.append(Fault(f"{section}.dataset_path", reason, remedy, dataset_path))
    if not tables:
        remedy = "Give a name, a path, or tables of sources."
        faults.append(Fault(setting, "names no source.", remedy, dataset))
    for position, table in enumerate(tables):
        where = setting if isinstance(dataset, Mapping) else f"{setting}[{position}]"
        faults += _faults_of_table(table, where)
    if faults:
        raise ConfigError(faults)
    return [_completed(SourceSpec(**table)) for table in tables]


def open_sources(
    specs: Sequence[SourceSpec],
    dealing: Dealing,
    section: str = "training",
    dataset_path: str | None = None,
) -> list[Source]:
    """Find, index and probe the documents; ConfigError where there are none."""
    setting = f"{section}.dataset" if dataset_path is None else f"{section}.dataset_path"
    return [_open(spec, key, dealing, setting) for key, spec in enumerate(specs)]


def _named(dataset: str, dataset_path: str | None, section: str) -> SourceSpec:
    if dataset in REGISTERED:
        spec = REGISTERED[dataset]
        return spec if dataset_path is None else replace(spec, path=dataset_path, name=dataset)
    if dataset_path is None and find_files(dataset):
        return SourceSpec(path=dataset)
    reason = "is neither a registered dataset nor files that exist."
    remedy = (
        f"{did_you_mean(dataset, REGISTERED)} Registered: {', '.join(REGISTERED)}; or name files, "
        "or a table {name = 'owner/dataset'} for the Hub."
    )
    raise ConfigError([Fault(f"{section}.dataset", reason, remedy.lstrip(), dataset)])


def _faults_of_table(table: Mapping[str, Any], where: str) -> list[Fault]:
    if not isinstance(table, Mapping):
        return [Fault(where, "a source is a table.", "Write {path = '...', weight = 1.0}.", table)]
    known = {field.name: field for field in fields(SourceSpec)}
    faults = []
    for key, value in table.items():
        if key not in known:
            faults.append(unknown_key(where, key, value, "a source", known))
        elif key == "weight":
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                faults.append(Fault(f"{where}.weight", "must be a number above zero.", value=value))
        elif not isinstance(value, str):
            faults.append(Fault(f"{where}.{key}", "must be a string.", value=value))
        elif key == "path" and not value:
            faults.append(Fault(f"{where}.{key}", "is empty.", value=value))
    if ("path" in table) == ("name" in table):
        reason = "a source has either a path or a name."
        faults.append(Fault(where, reason, "Give one of the two.", dict(table)))
    return faults


def _completed(spec: SourceSpec) -> SourceSpec:
    """A table that names a registered dataset, completed by what the register says of it."""
    if spec.name not in REGISTERED:
        return spec
    given = {
        f.name: getattr(spec, f.name) for f in fields(spec) if getattr(spec, f.name) != f.default
    }
    return replace(REGISTERED[spec.name], **{**given, "name": REGISTERED[spec.name].name})


def _open(spec: SourceSpec, key: int, dealing: Dealing, setting: str) -> Source:
    if spec.path is None:
        shards = open_hub(spec.name, spec.subset, spec.split, spec.text_key, setting)
        return StreamedSource(spec.name, shards, key, dealing)
    files = open_files(spec.path, spec.text_key, setting)
    source = IndexedSource(spec.name or spec.path, files, key, dealing)
    if not len(source):
        remedy = "Name files that have some."
        raise ConfigError([Fault(setting, "holds no document.", remedy, spec.path)])
    reasons = []
    for document in range(min(_PROBED, len(source))):
        try:
            source[document]
        except BadDocument as error:
            reasons.append(str(error))
        else:
            return source
    reason = f"none of its first {len(reasons)} documents can be used: {reasons[0]}."
    remedy = "Repair the file, or set text_key in the source's table."
    raise ConfigError([Fault(setting, reason, remedy, spec.path)])
