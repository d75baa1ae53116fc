"""One run a folder: two that save there would set aside each other's checkpoints."""

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
    holder = ""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # never closed: that would end the lock
        holder = os.pread(file, 1000, 0).decode(errors="replace")
        # Not flock: a child that outlives a killed run would still have that.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        reason = f"another run works there, {holder or 'of which nothing is known'}."
        remedy = "Wait for its end, or choose another folder."
        raise ConfigError([Fault("job.dump_folder", reason, remedy, value=dump_folder)]) from None
    except OSError as error:  # no locks on this file system, or a file of another user's
        logger.warning(f"{path} cannot be locked ({error}): a second run in this folder would not be noticed")
