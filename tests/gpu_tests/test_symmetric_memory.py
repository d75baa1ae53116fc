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


def start(*argv):
    return subprocess.Popen([*RANKS, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output_of(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def test_dispatch_and_combine():
    out = output_of(start("tests.gpu_tests.symmetric_memory_ranks"))
    print(out)
    for what in ("all cases equal all-to-all in every bit", "no host syncs", "too many rows make NaN"):
        assert out.count(what) == 2, out


def test_a_run_goes_as_with_all_to_all(tmp_path):
    backends = ("standard", "symmetric_memory")
    option = "--parallelism.expert_parallel_comm_backend="
    folders = [tmp_path / backend for backend in backends]
    runs = [  # beside each other: their start takes longer than they do
        start("torchtitan.train", *RUN, option + backend, f"--job.dump_folder={folder}")
        for backend, folder in zip(backends, folders, strict=True)
    ]
    for run in runs:
        output_of(run)
    expected, found = map(losses, folders)
    assert found == pytest.approx(expected, rel=1e-3)


def losses(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]
