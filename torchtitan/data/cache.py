"""Where are copies of data kept that are made once, such as unpacked files?"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan.logging import logger


class CacheNotWritable(OSError):
    """The folder of the copies does not exist and cannot be made, is another's, or is full."""


def cached(original: Path, suffix: str, write: Callable[[Path], None]) -> Path:
    """A file made from `original` by `write(target)`: at first use, again when `original` changes.

    Lies in torchtitan/data in $XDG_CACHE_HOME, else ~/.cache; that may be deleted whenever no run is
    using it. Raises CacheNotWritable, or what `write` raises.
    """
    folder = _cache_home() / "torchtitan" / "data"
    stat = original.stat()
    identity = f"{original.resolve()} {stat.st_size} {stat.st_mtime_ns} {suffix}"
    target = (
        folder / f"{original.name}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}{suffix}"
    )
    if target.exists():
        return target
    with _locked(folder, f"{target.name}.lock"):
        if not target.exists():
            logger.info(f"preparing {original} for random access, once: {target}")
            partial = folder / f"{target.name}.partial"
            try:
                write(partial)
                os.replace(partial, target)
            except OSError as error:  # of reading `original`, too
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise CacheNotWritable(f"{folder}: {error.strerror}") from error
                raise
            finally:
                partial.unlink(missing_ok=True)
    return target


def _cache_home() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"  # as its specification asks


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Of the ranks of a host the first one enters, the others wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / name, "w")
    except OSError as error:
        raise CacheNotWritable(f"{folder}: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
