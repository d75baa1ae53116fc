"""Steps are timed on a GPU without waiting for it; varying documents need no new code there."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from torchtitan.models.attention import attend
from torchtitan.models.attention_mask import Documents, Pattern
from torchtitan.observability.clock import DeviceTimer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
LENGTH = 256


def test_the_timer_waits_for_nothing_and_counts_what_the_gpu_did():
    timer, x = DeviceTimer(GPU), torch.randn(4096, 4096, device=GPU)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            with timer.running():
                torch.cuda._sleep(50_000_000)  # clock ticks: some 25 ms
            x @ x
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert 0.03 < timer.read() < 0.5
    assert timer.read() == 0.0


@pytest.mark.parametrize("attn_type", ["sdpa", "flex", "varlen"])
def test_any_number_of_documents_has_the_same_compiled_code(attn_type):
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attend, backend=graphs)
    q, k, v = torch.randn(3, 1, LENGTH, 4, 64, device=GPU, dtype=torch.bfloat16).unbind()
    q.requires_grad_()
    for num_documents in (2, 64, 128, 256, 1):
        lengths = [[LENGTH // num_documents] * num_documents]
        mask = Documents.build(lengths, [Pattern()], attn_type, GPU).masks[Pattern()]
        compiled(q, k, v, mask).sum().backward()
        torch.testing.assert_close(compiled(q, k, v, mask), attend(q, k, v, mask), rtol=2e-2, atol=2e-2)
    assert graphs.frame_count == 1
