"""debug.deterministic on a GPU: two runs, each compiling by itself, give the same bits."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COMMON = [
    "--model.overrides.n_layers=2",
    "--training.steps=6",
    "--training.seq_len=1024",
    "--training.local_batch_size=4",
    "--metrics.log_freq=1",
    "--debug.seed=0",
    "--debug.deterministic",
]
DENSE = [
    "--model.flavor=debugmodel",
    "--model.overrides.dim=1024",
    "--model.overrides.n_kv_heads=4",
    "--model.overrides.ffn_dim=4096",
    "--compile.enable",
]
RUNS = {
    "dense, compiled": DENSE,
    "experts": ["--model.name=qwen3", "--model.flavor=debugmodel_moe"],
    "varlen": ["--model.flavor=debugmodel_varlen_attn"],
}


def start(folder, options):
    """A run with caches of its own: what it compiles, and chooses by time, it does not take over."""
    caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-m", "torchtitan.train", *COMMON, *options, f"--job.dump_folder={folder}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | caches, **pipes)


def curve(folder):
    """Loss and gradient norm by step."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]


@pytest.mark.parametrize("name", RUNS)
def test_two_runs_have_the_same_bits(tmp_path, name):
    folders = [tmp_path / "one", tmp_path / "other"]
    runs = [start(folder, RUNS[name]) for folder in folders]
    for run in runs:
        output = run.communicate(timeout=300)[0]
        assert run.returncode == 0, output
    one, other = map(curve, folders)
    assert len(one) == 6 and one == other
