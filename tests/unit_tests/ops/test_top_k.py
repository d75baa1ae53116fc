"""The best columns of each row, on GPUs by a kernel of ours."""

import pytest
import torch

from torchtitan.ops.top_k import top_k

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("rows, columns, k", [(65, 128, 8), (7, 60, 4), (3, 5, 5), (0, 8, 2), (9, 1, 1)])
@pytest.mark.parametrize("device", DEVICES)
def test_the_best_come_first(device, rows, columns, k):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)
    chosen = top_k(scores, k)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, scores.sort(descending=True, stable=True).indices[:, :k])


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_masked_is_not_chosen(device):
    scores = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).to(device)
    masked = scores.masked_fill(torch.arange(16, device=device) % 4 > 0, float("-inf"))
    assert (top_k(masked, 4).sort().values == torch.arange(0, 16, 4, device=device)).all()


def test_the_operator_is_well_formed():
    torch.library.opcheck(top_k, (torch.randn(5, 8), 3))
