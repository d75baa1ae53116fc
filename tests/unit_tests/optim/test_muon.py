"""Muon on one process: torch's own updates, and every matrix of a stack updated by itself."""

import pytest
import torch
from torch import nn

from torchtitan.config.schema import Optimizer
from torchtitan.optim.muon import COEFFICIENTS, NUM_ITERATIONS, orthogonal
from torchtitan.optim.optimizer import build_optimizer, state_by_name

ADJUSTMENTS = ("match_rms_adamw", "original")


def train(params, optimizer, num_steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        numbers = torch.randn(sum(param.numel() for param in params), generator=generator)
        for param, part in zip(params, numbers.split([p.numel() for p in params]), strict=True):
            param.grad = part.view(param.shape)
        optimizer.step()
        optimizer.zero_grad()


def muon(named, dtype=torch.float32, **settings):
    return build_optimizer(named, Optimizer(name="Muon", lr=1e-2, **settings), dtype)


def matrices(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
def test_updates_are_those_of_torch(adjustment):
    shapes = (8, 8), (24, 8), (8, 40), (1, 5)
    ours, theirs = matrices(*shapes), matrices(*shapes)
    named = [(f"layers.{n}.w", param) for n, param in enumerate(ours)]
    settings = {"muon_lr_adjustment": adjustment, "muon_momentum": 0.9}
    train(ours, muon(named, torch.bfloat16, **settings))
    train(theirs, torch.optim.Muon(theirs, lr=1e-2, momentum=0.9, weight_decay=0.1, adjust_lr_fn=adjustment))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 4, 12), (2, 12, 4), (1, 1, 7), (2, 0, 4), (0, 4, 4)])
def test_singular_values_follow_the_polynomial(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / x.flatten(1).norm(dim=1)[:, None].clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonal(x), u @ s.diag_embed() @ v)


def test_a_matrix_without_gradient_gets_no_update():
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_stacks_too_large_to_work_on_at_once_are_divided(monkeypatch):
    x = torch.randn(5, 6, 4)
    whole = orthogonal(x)
    monkeypatch.setattr("torchtitan.optim.muon.MOST_ELEMENTS", 50)
    torch.testing.assert_close(orthogonal(x), whole)


@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
@pytest.mark.parametrize("shape", [(3, 2, 6, 4), (3, 4, 6)], ids=["w13", "w2"])
def test_the_matrices_of_experts_are_updated_each_by_itself(shape, adjustment):
    (stack,) = matrices(shape)
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach().flatten(end_dim=-3)]
    train([stack], muon([("layers.0.moe.experts.w", stack)], muon_lr_adjustment=adjustment))
    named = [(f"layers.{n}.w", param) for n, param in enumerate(alone)]
    train(alone, muon(named, muon_lr_adjustment=adjustment))
    torch.testing.assert_close(stack.flatten(end_dim=-3), torch.stack(alone), rtol=1e-6, atol=1e-6)


def test_one_without_a_gradient_is_left_alone_and_its_state_is_there():
    with_grad, without = matrices((4, 4), (4, 4))
    before = without.detach().clone()
    optimizer = muon([("layers.0.w", with_grad), ("layers.1.w", without)])
    train([with_grad], optimizer)
    assert torch.equal(without, before)
    assert not state_by_name(optimizer)["layers.1.w"]["momentum_buffer"].any()


def test_updates_are_as_large_as_adamws():
    (weight,) = matrices((256, 64))
    before = weight.detach().clone()
    train([weight], muon([("layers.0.w", weight)], weight_decay=0.0), num_steps=1)
    assert (weight.detach() - before).square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.15)
