"""One run a folder: two that save there would set aside each other's checkpoints."""

import errno
import fcntl
import os
import socket
from pathlib import Path

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.logging import logger

FILE = "run.lock"


def hold_folder(dump_folder: str) -> None:
    """Lock the folder until this process ends, however it ends. Raises ConfigError where another run has it."""
    path = Path(dump_folder, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # never closed: that would end the lock
    try:
        # Not flock: a child that outlives a killed run would still have that.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning(f"{path} cannot be locked ({error}): a second run in this folder would not be noticed")
            return
        holder = os.pread(file, 1000, 0).decode(errors="replace") or "of which nothing is known"
        remedy = "Wait for its end, or choose another folder."
        fault = Fault("job.dump_folder", f"another run works there, {holder}.", remedy, value=dump_folder)
        raise ConfigError([fault]) from None
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
