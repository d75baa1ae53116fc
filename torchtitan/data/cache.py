"""Where are copies of data kept that are made once, such as unpacked files?"""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from torchtitan.logging import logger


def cached(original: Path, suffix: str, write: Callable[[Path], None]) -> Path:
    """A file made from `original` by `write(target)`: at first use, again when `original` changes.

    Lies in ~/.cache/torchtitan/data, which may be deleted whenever no run is using it.
    """
    folder = Path.home() / ".cache" / "torchtitan" / "data"
    stat = original.stat()
    identity = f"{original.resolve()} {stat.st_size} {stat.st_mtime_ns} {suffix}"
    target = (
        folder / f"{original.name}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}{suffix}"
    )
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{target.name}.lock", "w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # of the ranks of a host the first one writes, the others wait
        if not target.exists():
            logger.info(f"preparing {original} for random access, once: {target}")
            partial = folder / f"{target.name}.partial"
            write(partial)
            os.replace(partial, target)
    return target
