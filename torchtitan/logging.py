"""The project's logger: one line format, tagged with the rank when there is more than one."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("torchtitan")


def init_logger() -> None:
    """Send the project's messages to stderr; called once by each entry point."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = f" rank {os.environ['RANK']}:" if world_size > 1 and "RANK" in os.environ else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[titan] %(asctime)s %(levelname)s{rank} %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


@contextmanager
def quiet(which: logging.Logger, level: int) -> Iterator[None]:
    """What this logger has to say below `level` is not said meanwhile."""
    before = which.level
    which.setLevel(level)
    try:
        yield
    finally:
        which.setLevel(before)
