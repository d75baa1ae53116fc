"""Which files make up a source, and how does an epoch go through their documents?"""

import glob
import gzip
import json
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.data.cache import CacheNotWritable, cached
from torchtitan.data.files import DocumentFile, JsonLines, TextFile, TokenFile
from torchtitan.data.permutation import mix, permute
from torchtitan.data.source import Dealing, Document

SUFFIXES = (
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".json",
    ".json.gz",
    ".json.zst",
    ".parquet",
    ".txt",
    ".bin",
)
"""Formats that are read; `.json` is lines of JSON, which is what datasets mean by it."""


class IndexedSource:
    """Documents that can be fetched by number, each epoch in an order of its own."""

    def __init__(self, name: str, files: Sequence[DocumentFile], key: int, dealing: Dealing):
        self.name, self.files, self.key, self.dealing = name, files, key, dealing
        self._ends = list(accumulate(map(len, files)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, document: int) -> Document:
        file = bisect_right(self._ends, document)
        return self.files[file][document - (self._ends[file - 1] if file else 0)]

    def read(self, slot: int, epoch: int, index: int) -> Document | None:
        """See Source: document i of an epoch's order belongs to slot i mod num_slots.

        With fewer documents than slots the dealing goes on where the last epoch stopped, so that in
        turn every slot gets some.
        """
        num_slots, size = self.dealing.num_slots, len(self)
        dealt_before = epoch * size if size < num_slots else 0
        place = (slot - dealt_before) % num_slots + index * num_slots
        if place >= size:
            return None
        if self.dealing.shuffle:
            place = permute(place, size, mix(self.dealing.seed, self.key, epoch))
        return self[place]


def open_files(pattern: str, text_key: str, setting: str) -> list[DocumentFile]:
    """The files that a path, a folder or a glob pattern stands for, in the order of their names."""
    paths = find_files(pattern)
    if not paths:
        remedy = f"Formats: {', '.join(SUFFIXES)}."
        raise ConfigError([Fault(setting, "no file of a known format is there.", remedy, pattern)])
    files, faults = [], []
    for path in paths:
        try:
            files.append(_open(path, text_key))
        except CacheNotWritable as error:
            reason = f"its copy or index cannot be written to {error}."
            remedy = "Make room there, or let XDG_CACHE_HOME name another folder."
            faults.append(Fault(setting, reason, remedy, str(path)))
        except (
            OSError,
            ValueError,
            EOFError,
            zlib.error,
            zstandard.ZstdError,
            pyarrow.ArrowException,
        ) as error:
            remedy = "Repair or remove the file."
            faults.append(Fault(setting, f"cannot be read: {error}.", remedy, str(path)))
    if faults:
        raise ConfigError(faults)
    return files


def find_files(pattern: str) -> list[Path]:
    """Files of known formats; a folder stands for all that are in it, at any depth."""
    found = [Path(name) for name in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
    paths = {file for path in found for file in (path.rglob("*") if path.is_dir() else (path,))}
    return sorted(path for path in paths if path.name.endswith(SUFFIXES) and path.is_file())


def _open(path: Path, text_key: str) -> DocumentFile:
    if path.suffix == ".txt":
        return TextFile(path)
    if path.suffix == ".bin":
        return TokenFile(path)
    if path.suffix == ".parquet":
        unpack = partial(_unpack_parquet, path, text_key)
        copy = cached(path, f".{text_key}.jsonl", unpack)
        return JsonLines(copy, text_key, named=path)
    if path.suffix in (".gz", ".zst"):
        opener: Callable = gzip.open if path.suffix == ".gz" else zstandard.open
        copy = cached(path, ".jsonl", partial(_decompress, opener, path))
        return JsonLines(copy, text_key, named=path)
    return JsonLines(path, text_key)


def _decompress(opener: Callable, path: Path, target: Path) -> None:
    with opener(path, "rb") as packed, open(target, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)


def _unpack_parquet(path: Path, text_key: str, target: Path) -> None:
    """Write the texts as lines of JSON: rows of a column store cannot be fetched singly."""
    with pyarrow.parquet.ParquetFile(path) as table, open(target, "w", encoding="utf-8") as lines:
        columns = table.schema_arrow.names
        if text_key not in columns:
            raise ValueError(
                f"there is no column {text_key!r}, only {', '.join(map(repr, columns))}"
            )
        kind = table.schema_arrow.field(text_key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"column {text_key!r} holds {kind}, not text")
        for rows in table.iter_batches(batch_size=1024, columns=[text_key]):
            lines.writelines(
                json.dumps({text_key: text}) + "\n" for text in rows.column(0).to_pylist()
            )
