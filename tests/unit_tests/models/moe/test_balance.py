"""Balance losses against their papers' formulas, written token by token."""

import pytest
import torch

from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.moe import MoE
from torchtitan.models.moe.router import score

DIM, EXPERTS, TOP_K, LENGTH, SEQUENCES = 12, 6, 2, 5, 4
COEFFS = ("sequence_balance_coeff", "global_balance_coeff", "router_z_coeff")


def layer(**changes):
    config = MoEConfig(num_experts=EXPERTS, top_k=TOP_K, ffn_dim=8, **changes)
    module = MoE(DIM, config, 0.02)
    module.fill_buffers(torch.device("cpu"))
    module.sequences_per_step = SEQUENCES
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=draw)
    if module.previous_load is not None:
        module.previous_load.copy_(torch.tensor([9, 1, 0, 4, 4, 2]))
    return module


def inputs():
    return torch.randn(SEQUENCES, LENGTH, DIM, generator=torch.Generator().manual_seed(1))


def by_the_formula(module, kind, x):
    """The whole batch's loss, coefficient 1."""
    total = 0.0
    for sequence in x:
        choice = module.router(sequence, module.expert_bias)
        shares = [scores / scores.sum() for scores in score(module.config, choice.logits)]
        if kind == "router_z_coeff":
            total += sum(torch.logsumexp(row, 0) ** 2 for row in choice.logits) / LENGTH
        elif kind == "global_balance_coeff":
            load = module.previous_load / (module.previous_load.sum() / EXPERTS)
            total += sum((load * share).sum() for share in shares) / LENGTH
        else:
            for expert in range(EXPERTS):
                times = (choice.selected_experts_indices == expert).sum()
                load = EXPERTS / (TOP_K * LENGTH) * times
                total += load * sum(share[expert] for share in shares) / LENGTH
    return total / SEQUENCES


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", COEFFS)
def test_gradients_are_those_of_the_formula(kind, score_func):
    module = layer(**{kind: 0.5}, score_func=score_func)
    out = module(inputs())
    (out * 0).sum().backward()  # nothing but the balance loss
    actual = module.router.gate.weight.grad
    (expected,) = torch.autograd.grad(
        0.5 * by_the_formula(module, kind, inputs()), module.router.gate.weight
    )
    assert expected.norm() > 1e-4
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


def test_microbatches_change_nothing():
    module = layer(**dict.fromkeys(COEFFS, 0.1))
    gradients = []
    for size in (SEQUENCES, 1):
        module.zero_grad()
        for part in inputs().split(size):
            module(part).square().sum().backward()
        gradients.append(module.router.gate.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_evaluation_and_outputs_are_without_losses():
    plain, with_losses = layer(), layer(**dict.fromkeys(COEFFS, 0.1))
    assert torch.equal(plain(inputs()), with_losses(inputs()))
    with_losses.eval()
    (with_losses(inputs()) * 0).sum().backward()
    assert not with_losses.router.gate.weight.grad.any()
