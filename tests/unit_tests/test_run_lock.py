"""One run a folder."""

import os
import socket
import subprocess
import sys

import pytest

from torchtitan.config.faults import ConfigError
from torchtitan.run_lock import hold_folder

HOLD = "import os, sys; from torchtitan.run_lock import hold_folder; hold_folder(sys.argv[1]); "


def start(folder, then):
    """A process that holds the folder, and then does as said until its stdin ends; and its first line."""
    command = [sys.executable, "-c", HOLD + then + "; sys.stdin.read()", str(folder)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    return process, process.stdout.readline()


def test_a_second_run_is_told_of_the_first(tmp_path):
    holder, _ = start(tmp_path / "new", "print(flush=True)")
    try:
        with pytest.raises(ConfigError, match=f"process {holder.pid} on {socket.gethostname()}"):
            hold_folder(str(tmp_path / "new"))
    finally:
        holder.kill()
        holder.wait()
    hold_folder(str(tmp_path / "new"))
    hold_folder(str(tmp_path / "new"))  # of this very process


def test_children_of_a_run_that_was_killed_do_not_hold_its_folder(tmp_path):
    holder, child = start(tmp_path, "child = os.fork(); print(child, flush=True) if child else 0")
    holder.kill()
    holder.wait()
    os.kill(int(child), 0)  # it is there
    hold_folder(str(tmp_path))
    holder.stdin.close()


def test_a_folder_that_cannot_be_locked_is_used(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", refuse)
    hold_folder(str(tmp_path))
    assert "would not be noticed" in caplog.text


def test_a_file_that_cannot_be_opened_ends_no_run(tmp_path, caplog):
    (tmp_path / "run.lock").mkdir()
    hold_folder(str(tmp_path))
    assert "would not be noticed" in caplog.text


def test_a_run_in_a_held_folder_is_refused(tmp_path):
    hold_folder(str(tmp_path))
    command = [sys.executable, "-m", "torchtitan.train", f"--job.dump_folder={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and f"another run works there, process {os.getpid()}" in run.stderr
