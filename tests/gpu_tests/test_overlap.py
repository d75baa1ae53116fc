"""On two GPUs rows fly while shared experts compute, and the host waits once a layer and forward."""

import pytest
import torch

from tests.gpu_tests.test_symmetric_memory import output_of, start

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_rows_fly_while_shared_experts_compute():
    out = output_of(start("tests.gpu_tests.overlap_ranks"))
    print(out)
    for what in ("one host sync", "rows fly while shared experts compute"):
        assert out.count(what) == 2, out
