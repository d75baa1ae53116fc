"""The symmetric-memory dispatcher on two GPUs: equal to all-to-all, and the host waits for nothing."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
RUN = [
    "--model.name=qwen3",
    "--model.flavor=debugmodel_moe",
    "--training.steps=4",
    "--training.seq_len=512",
    "--training.local_batch_size=4",
    "--validation.enable",
    "--validation.dataset=c4_test_validation",
    "--validation.steps=1",
    "--validation.seq_len=512",
    "--validation.local_batch_size=6",
    "--metrics.log_freq=1",
    "--debug.seed=0",
    "--parallelism.expert_parallel_degree=2",
]


def output_of(*argv):
    done = subprocess.run([*RANKS, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout


def test_dispatch_and_combine():
    out = output_of("tests.gpu_tests.symmetric_memory_ranks")
    for what in ("cases equal all-to-all", "no host syncs", "too many rows make NaN"):
        assert out.count(what) == 2, out


def losses(folder, backend):
    options = [f"--parallelism.expert_parallel_comm_backend={backend}", f"--job.dump_folder={folder}"]
    output_of("torchtitan.train", *RUN, *options)
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_goes_as_with_all_to_all(tmp_path):
    expected = losses(tmp_path / "standard", "standard")
    found = losses(tmp_path / "symmetric", "symmetric_memory")
    assert found == pytest.approx(expected, rel=1e-3)
