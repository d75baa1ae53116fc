"""Sums of each token's rows, and what each row is of; Triton's on GPUs too."""

import pytest
import torch

from torchtitan.ops.rows import invert_rows, sum_rows

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("num_rows", [0, 9])
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_below_zero_adds_nothing(device, num_rows, dtype):
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(num_rows, 40, generator=draw).to(dtype)
    rows = torch.randint(-1, num_rows, (7, 3), generator=draw)
    expected = torch.zeros(7, 40, dtype=torch.float64)
    for token, of_token in enumerate(rows.tolist()):
        for row in of_token:
            expected[token] += y[row].double() if row >= 0 else 0
    found = sum_rows(y.to(device), rows.to(device)).cpu()
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("num_gaps", [0, 4])
@pytest.mark.parametrize("num_tokens", [0, 700])
@pytest.mark.parametrize("device", DEVICES)
def test_each_row_is_told_its_token_and_score(device, num_tokens, num_gaps, weighted):
    num_rows = 3 * num_tokens + num_gaps
    draw = torch.Generator().manual_seed(0)
    rows = torch.randperm(num_rows, generator=draw)[num_gaps:].view(num_tokens, 3).int().to(device)
    scores = torch.rand(num_tokens, 3, generator=draw).to(device)
    tokens, by_row = invert_rows(rows, scores if weighted else None, num_rows)
    own = torch.arange(num_tokens, device=device).unsqueeze(1).expand(num_tokens, 3)
    assert tokens.shape == (num_rows,) and tokens.dtype == torch.int32
    assert torch.equal(tokens[rows], own.int()) and (tokens == -1).sum() == num_gaps
    assert (by_row is not None) == weighted
    if weighted:
        assert torch.equal(by_row[rows], scores) and (by_row[tokens < 0] == 0).all()
