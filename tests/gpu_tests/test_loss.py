"""The loss from chunks of logits, and its gradients. `python -m pytest tests/gpu_tests/test_loss.py`"""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.ops import cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS, DIM, VOCAB = 200, 256, 4104


@pytest.mark.parametrize("num_chunks", [1, 2, 7])
def test_it_and_its_gradients_are_those_of_fp64(monkeypatch, num_chunks):
    chunk = -(-TOKENS // num_chunks)
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", chunk * VOCAB * 2)
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, device="cuda").mul(DIM**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,), device="cuda")
    labels[::3] = cross_entropy.IGNORE_INDEX
    loss = cross_entropy.chunked_linear_cross_entropy(hidden, weight, labels)
    ours = torch.autograd.grad(loss / 7, [hidden, weight])
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-3, atol=0.0)
    for mine, theirs in zip(ours, torch.autograd.grad(wanted / 7, exact), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 1e-2 * theirs.norm()


def test_gradients_are_scaled_by_the_exact_factor():
    """A scalar on the GPU would be rounded to bf16 before: 0.4 % off for this number of tokens."""
    x = torch.randn(4096, device="cuda").bfloat16()
    factor = torch.tensor(1 / 130_555, device="cuda")
    assert torch.equal(cross_entropy._scaled(x, factor, x.dtype), (x.float() * factor).bfloat16())
