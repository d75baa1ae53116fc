"""Experts in float8 on two GPUs: rows aligned after the exchange, and rows that travel as float8."""

import pytest
import torch

from tests.gpu_tests.test_symmetric_memory import output_of, start
from torchtitan.ops import float8

HAS_TWO = torch.cuda.device_count() > 1 and float8.has_float8(torch.device("cuda"))
pytestmark = pytest.mark.skipif(not HAS_TWO, reason="needs two Hopper GPUs")


def test_experts_compute_as_one_process_emulates_them():
    out = output_of(start("tests.gpu_tests.float8_exchange_ranks"))
    print(out)
    assert out.count("as one process emulates it") == 2, out
