"""How is a document found in a file? One class a format, each a random-access list of documents."""

import json
import mmap
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from torchtitan.data.cache import cached
from torchtitan.data.source import BadDocument, Document

_CHUNK = 1 << 24
_INDEX_KEPT_ABOVE = 1 << 28  # bytes; scanning less than this takes under a second


class DocumentFile(Protocol):
    """Raises BadDocument for a document that cannot be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


class _Mapped:
    """A file in memory by mapping, mapped again in each process that it is sent to."""

    path: Path

    @cached_property
    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_map"}


class JsonLines(_Mapped):
    """One JSON object a line, found by the offsets of the lines; blank lines are no documents."""

    def __init__(self, path: Path, text_key: str, named: Path | None = None):
        """`named` is the file to name in messages, where `path` is an unpacked copy of it."""
        self.path, self.text_key, self.named = path, text_key, named or path
        if path.stat().st_size < _INDEX_KEPT_ABOVE:
            self.starts = _line_starts(path)
        else:
            kept = cached(path, ".lines.npy", lambda target: _save(target, _line_starts(path)))
            self.starts = np.load(kept, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> str:
        start = int(self.starts[index])
        end = self._map.find(b"\n", start)
        line = self._map[start : end if end >= 0 else None]
        try:
            return text_of(json.loads(line), self.text_key)
        except (ValueError, RecursionError) as error:
            raise BadDocument(self._where(start), str(error)) from None

    def _where(self, start: int) -> str:
        line = 1 + sum(
            self._map[at : min(at + _CHUNK, start)].count(b"\n") for at in range(0, start, _CHUNK)
        )
        return f"{self.named}:{line}"


class TextFile:
    """One file, one document."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadDocument(str(self.path), f"not UTF-8 text ({error})") from None


class TokenFile(_Mapped):
    """Documents tokenized beforehand, as `write_tokens` writes them: nothing is added to them.

    X.bin holds token ids back to back, little-endian uint16 or uint32; X.index.npy holds where
    each document starts, counted in tokens, and at last the number of tokens, as int64.
    """

    def __init__(self, path: Path):
        self.path = path
        self.starts = np.load(index_path(path), mmap_mode="r")
        num_tokens, num_bytes = int(self.starts[-1]), path.stat().st_size
        if not num_tokens:
            raise ValueError("it holds no tokens")
        widths = {2 * num_tokens: np.dtype("<u2"), 4 * num_tokens: np.dtype("<u4")}
        if num_bytes not in widths:
            raise ValueError(
                f"{num_bytes} bytes are not 2 or 4 for each of the {num_tokens} tokens "
                f"of {index_path(path).name}"
            )
        self.dtype = widths[num_bytes]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        return np.frombuffer(self._map, self.dtype, end - start, start * self.dtype.itemsize)


def write_tokens(path: Path, documents: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Write documents of token ids below `vocab_size` as a `.bin` file with its index."""
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    starts = [0]
    with open(path, "wb") as file:
        for document in documents:
            file.write(np.asarray(document, dtype=dtype).tobytes())
            starts.append(starts[-1] + len(document))
    np.save(index_path(path), np.asarray(starts, dtype=np.int64))


def index_path(path: Path) -> Path:
    return path.with_suffix(".index.npy")


def text_of(record: object, text_key: str) -> str:
    """The text of a record of a dataset; ValueError where it holds none that can be tokenized."""
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected, this is {type(record).__name__}")
    if text_key not in record:
        raise ValueError(f"no key {text_key!r}, only {', '.join(map(repr, record))}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} holds {type(text).__name__}, not text")
    text.encode()  # ValueError for half of a surrogate pair, which JSON can spell
    return text


def _line_starts(path: Path) -> np.ndarray:
    """Byte offsets of the lines that are not blank."""
    ends = []
    data = (
        np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    )
    for at in range(0, len(data), _CHUNK):
        ends.append(np.flatnonzero(data[at : at + _CHUNK] == ord("\n")) + at)
    starts = np.concatenate([[0], *[end + 1 for end in ends]]).astype(np.int64)
    starts = starts[starts < len(data)]
    return starts[~np.isin(data[starts], (ord("\n"), ord("\r")))]


def _save(target: Path, array: np.ndarray) -> None:
    with open(target, "wb") as file:  # np.save given a path would add a suffix to it
        np.save(file, array)
