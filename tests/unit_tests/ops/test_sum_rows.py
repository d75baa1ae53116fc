"""Sums of each token's rows, Triton's on GPUs too."""

import pytest
import torch

from torchtitan.ops.rows import sum_rows

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
