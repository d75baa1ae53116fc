"""What experts need of a GPU's memory. `python -m pytest tests/gpu_tests` on a machine that has one."""

import pytest
import torch

from torchtitan.models.moe.experts import GroupedExperts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DIM, HIDDEN, EXPERTS, ROWS = 2048, 768, 16, 131072


def build(max_rows):
    torch.manual_seed(0)
    with torch.device("cuda"):
        experts = GroupedExperts(DIM, HIDDEN, EXPERTS, 0.02, max_rows_per_chunk=max_rows)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return experts.bfloat16()


def run(max_rows):
    """All rows to one expert: outputs and gradients, and the bytes at the peak beyond all of them."""
    experts = build(max_rows)
    rows = torch.randn(ROWS, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scores = torch.rand(ROWS, device="cuda", requires_grad=True)
    upstream = torch.randn_like(rows)
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda")
    counts[3] = ROWS
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = experts(rows, counts, scores)
    out.backward(upstream)
    results = [out.detach(), rows.grad, scores.grad, *(weight.grad for weight in experts.parameters())]
    beyond = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    return results, beyond


def test_chunks_bound_what_experts_keep_however_uneven_the_load():
    """Beside rows and results: sums of weight gradients in fp32 and a part's, and c rows of the rest."""
    size = 2048
    whole, beyond_whole = run(0)
    parts, beyond_parts = run(size)
    weights = 3 * EXPERTS * HIDDEN * DIM
    intermediates = size * (12 * HIDDEN + 2 * DIM) * 4
    assert beyond_parts < 6 * weights + intermediates + 2**20 < beyond_whole
    for mine, theirs in zip(parts, whole, strict=True):
        assert (mine.float() - theirs.float()).norm() < 1e-2 * theirs.float().norm()
