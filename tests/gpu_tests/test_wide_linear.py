"""The router's product on tensor cores. `python -m pytest tests/gpu_tests/test_wide_linear.py`"""

import pytest
import torch

from tests.unit_tests.ops.test_wide_linear import errors, operands
from torchtitan.ops.wide_linear import wide_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("rows, width, out", [(4096, 2048, 64), (333, 2048, 128), (16, 64, 8)])
def test_it_is_nearly_as_exact_as_on_a_cpu(rows, width, out):
    of_out, by_row, of_weight = errors(*operands("cuda", rows, width, out))
    # Tensor cores cut off what fp32 sums cannot hold where CPUs round it: 2.1e-6 seen at width 2048.
    assert of_out < 4e-6 and by_row < 3e-3 and of_weight < 3e-3


def test_it_compiles():
    x, weight, grad = operands("cuda", 512, 256, 16)
    compiled = torch.compile(lambda x, w: wide_linear(x * 1.0, w).softmax(-1), fullgraph=True)
    plain = wide_linear(x, weight).softmax(-1)
    torch.testing.assert_close(compiled(x, weight), plain, rtol=1e-5, atol=1e-6)
    torch.autograd.grad(compiled(x, weight), [x, weight], grad)
