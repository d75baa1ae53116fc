"""A process that reads data: what it loads, and that it ends although its workers are at work."""

import os
import signal
import subprocess
import sys
import time

from tests.unit_tests.data.helpers import ASSETS

READER = f"""
import sys, time
from torchtitan.data.loader import DataConfig, build_loader
from torchtitan.data.tokenizer import build_tokenizer
tokenizer = build_tokenizer({str(ASSETS / "tokenizer")!r})
loader = build_loader(DataConfig("c4_test", 2, 64, seed=0, num_workers=2), tokenizer, range(2))
next(loader)
assert "datasets" not in sys.modules, "an optional package was imported"
print(*(worker.pid for worker in loader._iterator._workers), flush=True)
"""


def test_a_process_ends_without_closing_its_workers():
    process = subprocess.run([sys.executable, "-c", READER], timeout=90, capture_output=True)
    assert process.returncode == 0, process.stderr


def test_workers_end_after_their_process_is_killed():
    process = subprocess.Popen(
        [sys.executable, "-c", READER + "time.sleep(300)"], stdout=subprocess.PIPE
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    for worker in workers:  # a signal to the whole job is the trainer's to answer
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker, number)
    time.sleep(0.5)
    assert all(map(is_running, workers))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlive the process they served"
        time.sleep(0.2)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
