"""What a checkpoint is on disk: published in one step, found, checked, kept and removed. Files only.

A checkpoint is a folder step-N with a manifest, written last, that lists every other file with its
size and checksums. It comes to be under the name step-N.tmp; whatever has that ending is a leftover.
Where a run saves a step a second time, the first one is called step-N.replaced for a moment.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the manifest and of what it stands for; a reader refuses newer ones."""
BLOCK_BYTES = 32 * 2**20
"""Files are checksummed in blocks of this size, several at a time."""

MODEL = "model."
"""What begins the names of a model's tensors in a checkpoint."""
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)(\.replaced)?")
_NUM_THREADS = 4


def temporary_path(folder: Path, step: int) -> Path:
    """Where step-`step` is written before it is published."""
    return folder / f"step-{step}.tmp"


def candidates(folder: Path) -> list[Path]:
    """Every published checkpoint, sound or not, the best first: newest step, latest save of it."""
    paths = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (step_of(path), -len(path.name)), reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name)[1])


def saved_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, oldest first."""
    return sorted({step_of(path) for path in candidates(folder) if not damage(path)})


def has_manifest(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST).exists()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """{"format", "progress", "origin", "files"} of a checkpoint; ValueError where it is damaged."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    checksum = content.pop("crc32")
    if checksum != _crc32(json.dumps(content).encode()):
        raise ValueError("does not match its checksum")
    return content


def damage(checkpoint: Path) -> str:
    """The first file that is missing or has another size than it had, and how; empty if none is.

    Looks at sizes only, so it costs next to nothing; `altered_files` reads everything.
    """
    if not has_manifest(checkpoint):
        return f"{MANIFEST} is missing"
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, entry in files.items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes in place of {entry['bytes']:,}"
    return ""


def altered_files(checkpoint: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """Names of the files that no longer have their checksums; of every `num_parts`-th file only."""
    files = read_manifest(checkpoint)["files"]
    by_size = sorted(files, key=lambda name: (files[name]["bytes"], name), reverse=True)

    def is_altered(name: str) -> bool:
        try:
            return fingerprint(checkpoint / name) != files[name]
        except OSError:  # a bad block of the disk
            return True

    return [name for name in by_size[part::num_parts] if is_altered(name)]


def fingerprint(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size and the checksum of each block."""
    size = path.stat().st_size

    def checksum(start: int) -> str:
        return _crc32(os.pread(file.fileno(), BLOCK_BYTES, start))

    with path.open("rb") as file, ThreadPoolExecutor(_NUM_THREADS) as threads:
        return {"bytes": size, "crc32": list(threads.map(checksum, range(0, size, BLOCK_BYTES)))}


def new_folder(path: Path) -> None:
    """An empty folder, whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def publish(temporary: Path, content: Mapping[str, Any]) -> Path:
    """Write the manifest and give a complete step-N.tmp its name; the checkpoint.

    `content` is the manifest's. Files are on the disk before the name is, so that the name is never
    that of a checkpoint in parts; one that had the name before stays until then under another.
    """
    final = temporary.with_suffix("")
    content = {"format": FORMAT, **content}
    content["crc32"] = _crc32(json.dumps(content).encode())
    (temporary / MANIFEST).write_text(json.dumps(content))
    flush(temporary / MANIFEST)
    flush(temporary)
    if final.exists():
        if damage(final):
            _remove(final)
        else:
            replaced = final.with_name(f"{final.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
    temporary.rename(final)
    flush(final.parent)
    return final


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted saves have left; nothing that could be the only good checkpoint."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step-*.replaced"):
        if not damage(path.with_suffix("")):
            _remove(path)


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps than the one being saved: no run goes on from them.

    They are of a run that this one went back behind (checkpoint.load_step); returns the new names.
    """
    aside = []
    for path in candidates(folder):
        if step_of(path) > step:
            names = (folder / f"aside-{path.name}-{n}" for n in count(1))
            aside.append(path.rename(next(name for name in names if not name.exists())))
    return aside


def remove_old(folder: Path, keep: int, saved: Path) -> None:
    """Delete all but `saved`, the newest `keep` whole checkpoints, and what is newer than these."""
    if keep == 0:
        return
    whole = [path for path in candidates(folder) if not damage(path)]
    if len(whole) <= keep:
        return
    oldest_kept = step_of(whole[keep - 1])
    for path in candidates(folder):
        if step_of(path) < oldest_kept and path != saved:
            _remove(path)


def total_bytes(files: Iterable[Mapping[str, Any]]) -> int:
    return sum(entry["bytes"] for entry in files)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; at no moment does half of one have its name."""
    leftover = checkpoint.with_name(f"{checkpoint.name}.old.tmp")
    shutil.rmtree(leftover, ignore_errors=True)
    checkpoint.rename(leftover)
    shutil.rmtree(leftover, ignore_errors=True)  # what resists is tried again at the next save


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk: a crash of the machine would lose them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"
