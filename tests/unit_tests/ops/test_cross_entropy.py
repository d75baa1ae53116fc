"""The loss from hidden states in chunks: the loss, its gradients, its memory; Triton's pass on GPUs too."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.ops import cross_entropy
from torchtitan.ops.cross_entropy import (
    IGNORE_INDEX,
    chunked_linear_cross_entropy,
    cross_entropy_,
    linear_cross_entropy,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TOKENS, DIM, VOCAB = 21, 32, 300


def inputs(dtype, device, valid=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, TOKENS // 3, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (3, TOKENS // 3), generator=generator)
    labels[0, 2], labels[2] = IGNORE_INDEX, IGNORE_INDEX
    labels = labels if valid else torch.full_like(labels, IGNORE_INDEX)
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    return *leaves, labels.to(device)


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("rows", [1, 5, TOKENS, 10 * TOKENS])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("device", DEVICES)
def test_chunks_give_the_loss_and_gradients_of_the_whole(device, dtype, tolerance, rows, monkeypatch):
    hidden, weight, labels = inputs(dtype, device)
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", rows * weight[:, 0].numel() * weight.itemsize)
    loss = chunked_linear_cross_entropy(hidden, weight, labels)
    grads = torch.autograd.grad(loss / 7, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = F.linear(exact[0].flatten(0, -2), exact[1])
    exact_loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    wanted = torch.autograd.grad(exact_loss / 7, exact)
    assert loss.dtype == torch.float32
    assert error(loss, exact_loss) < tolerance
    for ours, theirs, leaf in zip(grads, wanted, (hidden, weight), strict=True):
        assert (ours.dtype, ours.shape) == (leaf.dtype, leaf.shape)
        assert error(ours, theirs) < tolerance


def test_agrees_with_the_whole_logits():
    hidden, weight, labels = inputs(torch.float32, "cpu")
    loss, whole = (f(hidden, weight, labels) for f in (chunked_linear_cross_entropy, linear_cross_entropy))
    torch.testing.assert_close(loss, whole)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_valid_label_all_is_zero(device):
    hidden, weight, labels = inputs(torch.float32, device, valid=False)
    loss = chunked_linear_cross_entropy(hidden, weight, labels)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_without_gradients_none_is_computed(monkeypatch):
    hidden, weight, labels = inputs(torch.float32, "cpu")
    monkeypatch.setattr(torch, "empty_like", None)
    with torch.no_grad():
        assert chunked_linear_cross_entropy(hidden, weight, labels).isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_shows_in_the_loss(device, bad):
    logits = torch.randn(4, VOCAB, device=device)
    logits[1, 7] = bad
    losses = cross_entropy_(logits, torch.tensor([1, 2, 3, 4], device=device))
    assert losses.isfinite().tolist() == [True, False, True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vocab", [1000, 32768, 128256])
def test_the_kernel_computes_the_reference(vocab):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 5 * torch.randn(64, vocab, device="cuda", generator=generator)
    logits[3] = float("-inf")
    logits[3, 5] = 0.0
    labels = torch.randint(vocab, (64,), device="cuda", generator=generator)
    labels[3], labels[9] = 5, IGNORE_INDEX
    gradient, wanted = logits.clone(), logits.cpu().double()
    losses = cross_entropy_(gradient, labels)
    exact = cross_entropy_(wanted, labels.cpu())
    torch.testing.assert_close(losses.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_logits_of_a_chunk_at_a_time_exist(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 2**26)
    hidden = torch.randn(16384, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32768, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(32768, (16384,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chunked_linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**26
