"""Kernels of experts are measured where there are two kinds: on a Hopper GPU, once, without a trace.

`python -m pytest tests/gpu_tests/test_kernel_choice.py`
"""

import json
import re
import subprocess
import sys

import pytest
import torch

from torchtitan import kernel_choice
from torchtitan.kernel_choice import CANDIDATES, FILE, Shape, faster

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
GPU = torch.device("cuda", 0)
WIDE = Shape(4096, 14336, 2, 512, 2, "swiglu", weighted=True, gathered=False)
SHAPES = {
    "q30b": Shape(2048, 768, 16, 512, 8, "swiglu", weighted=True, gathered=True),
    "beyond L2": WIDE,
}
SAID = (
    r"experts' kernels: (fused|unfused); forward and backward take fused (\d+\.\d+) ms, unfused (\d+\.\d+) ms "
)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_are_measured_once_and_leave_no_trace(shape, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="torchtitan")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    best = faster(shape, GPU, tmp_path / FILE)
    assert best in CANDIDATES
    # But for workspaces of libraries.
    assert torch.cuda.max_memory_reserved() == torch.cuda.memory_reserved() < before + 2**27
    [line] = caplog.messages
    name, fused, unfused = re.match(SAID, line).groups()
    assert name == best and min(float(fused), float(unfused)) > 0
    [kept] = json.loads((tmp_path / FILE).read_text()).values()
    times = kept["milliseconds"]
    assert best == kept["backend"] == min(times, key=times.get)
    monkeypatch.setattr(kernel_choice, "measure", None)
    assert faster(shape, GPU, tmp_path / FILE) == best


def test_fused_products_are_right_beyond_what_the_rule_gives_them():
    experts, step = kernel_choice._workload(WIDE, GPU)
    results = []
    for name in CANDIDATES:
        experts.backend = name
        results.append(step())
    for one, other in zip(*results, strict=True):
        assert (one.double() - other.double()).norm() <= 1e-2 * other.double().norm()


def test_without_the_memory_the_rule_stays(tmp_path, caplog):
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved()
    limit = (used + 2**28) / torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(limit, GPU)
    try:
        assert faster(WIDE, GPU, tmp_path / FILE) == "auto"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert "could not be measured" in caplog.text
    assert torch.cuda.memory_reserved() <= used and torch.cuda.memory_stats(GPU)["num_ooms"] == 0


def test_a_run_multiplies_by_what_it_measured(tmp_path):
    argv = [f"--job.dump_folder={tmp_path}", "--training.steps=1", "--training.seq_len=256"]
    argv += ["--model.name=qwen3", "--model.flavor=debugmodel_moe", "--model.overrides.n_layers=1"]
    argv += ["--model.overrides.moe.ffn_dim=128", "--training.mixed_precision_param=bfloat16"]
    command = [sys.executable, "-m", "torchtitan.train", *argv]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    best = re.search(SAID, run.stderr)[1]
    [used] = re.findall("multiply in torch.bfloat16 by (.*)", run.stderr)
    inside = " with gathers and gating inside" if best == "fused" else ""
    assert used == f"grouped GEMM{inside}"
    assert (tmp_path / FILE).exists()
