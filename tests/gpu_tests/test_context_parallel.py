"""Context parallelism on GPUs: each kernel on parts of sequences, and runs on two GPUs beside one."""

import json
import subprocess
import sys

import pytest
import torch

from torchtitan.models.attention import attend
from torchtitan.models.attention_mask import Documents, Pattern
from torchtitan.sequence_part import WHOLE, SequencePart

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
LENGTH = 1024
LENGTHS = [[LENGTH], [301, 1, 510, 212]]
PATTERNS = {
    "sdpa": [Pattern()],
    "flex": [Pattern(), Pattern(window=100), Pattern(chunk=128)],
    "varlen": [Pattern(), Pattern(window=100), Pattern(chunk=128)],
}
CASES = [
    # attention, causal over the whole sequence, query heads, key/value heads, channels, value's
    ("sdpa", True, 8, 2, 64, 64),
    ("sdpa", True, 4, 4, 192, 128),
    ("sdpa", False, 8, 2, 64, 64),
    ("flex", False, 8, 2, 64, 64),
    ("flex", False, 4, 4, 192, 128),
    ("varlen", False, 8, 8, 64, 64),
]


def masks(attn_type, causal, part, patterns):
    if causal:
        return Documents.causal(LENGTH, CUDA, part, part).masks
    return Documents.build(LENGTHS, patterns, attn_type, CUDA, part, part).masks


@pytest.mark.parametrize("head_tail", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_the_queries_give_parts_of_the_whole(case, head_tail):
    """Outputs, and gradients summed over the parts."""
    attn_type, causal, heads, kv_heads, channels, value_channels = case
    torch._dynamo.reset()  # one process has more shapes here than a run
    torch.manual_seed(0)
    shapes = (heads, channels), (kv_heads, channels), (kv_heads, value_channels)
    inputs = [
        torch.randn(2, LENGTH, *shape, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    ]
    for pattern in PATTERNS[attn_type]:
        whole = masks(attn_type, causal, WHOLE, [pattern])[pattern]
        expected = attend(*inputs, whole)
        upstream = torch.randn_like(expected)
        grads = torch.autograd.grad(expected, inputs, upstream)
        sums = [torch.zeros_like(grad, dtype=torch.float32) for grad in grads]
        for part in SequencePart(0, 4, head_tail).of_all_ranks():
            q, k, v = inputs
            end = part.spans(LENGTH)[-1].stop
            mask = masks(attn_type, causal, part, [pattern])[pattern]
            ours = attend(part.cut(q), k[:, :end], v[:, :end], mask)
            assert close(ours, part.cut(expected)), (pattern, part)
            for total, grad in zip(sums, torch.autograd.grad(ours, inputs, part.cut(upstream))):
                total += grad
        assert all(close(ours, theirs) for ours, theirs in zip(sums, grads, strict=True)), pattern


def close(ours, theirs):
    return (ours.float() - theirs.float()).norm() < 1e-2 * theirs.float().norm()


TINY = [
    "--model.overrides.n_layers=2",
    "--training.steps=4",
    "--training.seq_len=1024",
    "--training.global_batch_size=4",
    "--training.local_batch_size=2",
    "--metrics.log_freq=1",
    "--debug.seed=0",
]
SDPA, FLEX, VARLEN = "debugmodel", "debugmodel_flex_attn", "debugmodel_varlen_attn"
CP = "--parallelism.context_parallel"
RUNS = [
    (SDPA, []),
    (SDPA, [f"{CP}_rotate_method=alltoall", "--compile.enable"]),
    (FLEX, [f"{CP}_load_balancer=None"]),
    (VARLEN, ["--compile.enable"]),
    (VARLEN, [f"{CP}_method=heads", "--activation_checkpoint.selective_ac_option=op"]),
    (SDPA, [f"{CP}_method=heads", "--compile.enable"]),
]


def losses(folder, num_ranks, flavor, options):
    argv = [*TINY, f"--model.flavor={flavor}", f"--job.dump_folder={folder}", *options]
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [sys.executable, "-m", *launch, "-m", "torchtitan.train", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("flavor", "options"), RUNS)
def test_two_gpus_train_as_one(tmp_path, flavor, options):
    expected = losses(tmp_path / "one", 1, flavor, [])
    ours = losses(tmp_path / "two", 2, flavor, [f"{CP}_degree=2", *options])
    for (loss, norm), (our_loss, our_norm) in zip(expected, ours, strict=True):
        assert our_loss == pytest.approx(loss, rel=2e-3)
        assert our_norm == pytest.approx(norm, rel=2e-2)
