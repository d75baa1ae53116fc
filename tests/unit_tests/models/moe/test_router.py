"""The router against transformers' and against plain formulas.

T tokens, D model, E experts, K top-k.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.router import TokenChoiceTopKRouter

T, D, E, K = 50, 16, 8, 3


def build(dtype=torch.float32, **config):
    config = MoEConfig(**{"num_experts": E, "top_k": K, "ffn_dim": 4} | config)
    router = TokenChoiceTopKRouter(D, config, init_std=0.02)
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return router


def tokens(dtype=torch.float32, num_tokens=T):
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(1)).to(dtype)


SHAPE = {"hidden_size": D, "num_attention_heads": 4, "num_experts_per_tok": K}
GROUPS = {"n_group": 4, "topk_group": 2}
OUR_GROUPS = {"num_expert_groups": 4, "num_limited_groups": 2}
FAMILIES = {
    "qwen3_moe": (
        Qwen3MoeTopKRouter(Qwen3MoeConfig(**SHAPE, num_experts=E, norm_topk_prob=True)),
        {"route_norm": True},
    ),
    "qwen3_moe not normalised": (
        Qwen3MoeTopKRouter(Qwen3MoeConfig(**SHAPE, num_experts=E, norm_topk_prob=False)),
        {},
    ),
    "mixtral": (
        MixtralTopKRouter(MixtralConfig(**SHAPE, num_local_experts=E)),
        {"route_norm": True},
    ),
    "deepseek_v2": (
        DeepseekV2TopkRouter(
            DeepseekV2Config(
                **SHAPE, **GROUPS, n_routed_experts=E, topk_method="group_limited_greedy",
                routed_scaling_factor=1.5,
            )
        ),
        {**OUR_GROUPS, "num_scores_per_group": 1, "route_scale": 1.5, "router_in_fp32": True},
    ),
    "deepseek_v3": (
        DeepseekV3TopkRouter(
            DeepseekV3Config(
                **SHAPE, **GROUPS, n_routed_experts=E, norm_topk_prob=True,
                routed_scaling_factor=2.5,
            )
        ),
        {
            **OUR_GROUPS, "score_func": "sigmoid", "route_norm": True, "route_scale": 2.5,
            "router_in_fp32": True,
        },
    ),
    "gpt_oss": (
        GptOssTopKRouter(GptOssConfig(**SHAPE, num_local_experts=E)),
        {"score_chosen_only": True, "router_bias": True},
    ),
    "llama4": (
        Llama4Router(Llama4TextConfig(**SHAPE | {"num_experts_per_tok": 1}, num_local_experts=E)),
        {"score_func": "sigmoid", "score_chosen_only": True, "top_k": 1},
    ),
}  # fmt: skip


def scattered(ids, top_scores):
    """(T, E): the scores at the experts' places, so that the order of a token's choices is gone."""
    return torch.zeros(len(ids), E, dtype=top_scores.dtype).scatter(1, ids, top_scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("theirs, config", FAMILIES.values(), ids=FAMILIES)
def test_scores_and_gradients_equal_transformers(theirs, config, dtype):
    router = build(dtype, **config)
    theirs = theirs.to(dtype)
    theirs.weight.data = router.gate.weight.data.clone()
    if router.gate.bias is not None:
        theirs.bias.data = router.gate.bias.data.clone()
    bias = None
    if hasattr(theirs, "e_score_correction_bias"):
        bias = torch.randn(E, generator=torch.Generator().manual_seed(2))
        theirs.float().e_score_correction_bias.copy_(bias)
        theirs.weight.data = theirs.weight.data.to(dtype)
    x = tokens(dtype).requires_grad_()
    choice = router(x, bias)
    ours = scattered(choice.selected_experts_indices, choice.top_scores)
    first, second, *rest = theirs(x)  # llama4 returns all scores first, the others logits
    expected = scattered(rest[0], second) if rest else first
    # gpt_oss, llama4 and qwen3 round scores to the layer's dtype; we keep them in fp32.
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(ours, expected.float(), rtol=tolerance, atol=tolerance / 10)
    weighting = torch.randn(T, E, generator=torch.Generator().manual_seed(3))
    mine = torch.autograd.grad((ours * weighting).sum(), [x, router.gate.weight])
    other = torch.autograd.grad((expected * weighting).sum(), [x, theirs.weight])
    for a, b in zip(mine, other):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.norm()


@pytest.mark.parametrize("chosen_only", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("func", ["softmax", "sigmoid"])
def test_scores_follow_the_formula(func, norm, chosen_only):
    router = build(score_func=func, route_norm=norm, score_chosen_only=chosen_only, route_scale=2.5)
    choice = router(tokens())
    assert choice.top_scores.dtype == torch.float32
    assert choice.selected_experts_indices.dtype == torch.int64
    logits = tokens().double() @ router.gate.weight.double().t()
    for token in range(T):
        best = sorted(range(E), key=lambda expert: -logits[token, expert])[:K]
        assert choice.selected_experts_indices[token].tolist() == best
        among = logits[token, best] if chosen_only else logits[token]
        scores = among.softmax(0) if func == "softmax" else among.sigmoid()
        scores = scores if chosen_only else scores[best]
        scores = scores / scores.sum() if norm else scores
        actual = choice.top_scores[token].double()
        torch.testing.assert_close(actual, 2.5 * scores, rtol=1e-5, atol=1e-7)


def test_sigmoid_chosen_only_orders_saturated_logits():
    router = build(score_func="sigmoid", score_chosen_only=True, top_k=2)
    router.gate.weight.data.zero_()[:, 0] = torch.arange(100.0, 100.0 + E)
    choice = router(torch.ones(1, D))
    assert choice.selected_experts_indices.tolist() == [[E - 1, E - 2]]


def test_the_correction_bias_steers_the_choice_only():
    router = build(score_func="sigmoid")
    bias = torch.zeros(E)
    bias[5] = 10
    x = tokens().requires_grad_()
    choice = router(x, bias)
    assert (choice.selected_experts_indices[:, 0] == 5).all()
    expected = choice.logits.gather(1, choice.selected_experts_indices).sigmoid()
    assert torch.equal(choice.top_scores, expected)


def test_no_expert_outside_the_best_groups():
    router = build(**OUR_GROUPS, num_scores_per_group=2, score_func="sigmoid")
    choice = router(tokens())
    quality = choice.logits.sigmoid().view(T, 4, 2).sum(-1)
    groups = choice.selected_experts_indices // 2
    allowed = quality.topk(2).indices
    assert all(set(groups[t].tolist()) <= set(allowed[t].tolist()) for t in range(T))


def test_more_experts_than_the_groups_hold_are_refused():
    with pytest.raises(AssertionError, match="top-5 of 4"):
        build(**OUR_GROUPS, top_k=5)


def test_ties_break_alike_for_any_number_of_tokens():
    router = build()
    router.gate.weight.data.zero_()
    ids = router(tokens()).selected_experts_indices
    assert all(len(set(row)) == K for row in ids.tolist())
    for num_tokens in [1, 2, 17, T]:
        again = router(tokens(num_tokens=num_tokens)).selected_experts_indices
        assert torch.equal(again, ids[:1].expand(num_tokens, K))


def test_forced_balance_gives_every_expert_the_same_load():
    router = build(force_load_balance=True)
    choice = router(tokens(num_tokens=16).requires_grad_())
    expected = torch.arange(16 * K).view(16, K) % E
    assert torch.equal(choice.selected_experts_indices, expected)
    assert torch.equal(choice.top_scores, choice.logits.softmax(1).gather(1, expected))
    assert torch.autograd.grad(choice.top_scores.sum(), router.gate.weight)[0].norm() > 0


def test_recorded_ids_can_be_replayed():
    router = build()
    router.record = []
    first = router(tokens())
    assert len(router.record) == 1 and torch.equal(router.record[0], first.selected_experts_indices)
    router.replay, router.record = router.record[0].flip(0), None
    replayed = router(tokens())
    assert torch.equal(replayed.selected_experts_indices, router.replay)
    assert torch.equal(replayed.top_scores, first.logits.softmax(1).gather(1, router.replay))


@pytest.mark.parametrize("router_in_fp32", [True, False])
def test_bf16_tokens_are_scored_in_fp32(router_in_fp32):
    router = build(torch.bfloat16, router_in_fp32=router_in_fp32, router_bias=True)
    x = tokens(torch.bfloat16).requires_grad_()
    choice = router(x)
    assert choice.logits.dtype == choice.top_scores.dtype == torch.float32
    exact = x.double() @ router.gate.weight.double().t() + router.gate.bias.double()
    error = (choice.logits - exact).norm() / exact.norm()
    assert error < (1e-6 if router_in_fp32 else 4e-3) and (router_in_fp32 or error > 1e-4)
    (gradient,) = torch.autograd.grad(choice.top_scores.square().sum(), x)
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()


def test_gradients_equal_finite_differences():
    router = build(torch.float64, score_func="sigmoid", route_norm=True, route_scale=2.0)
    x = tokens(torch.float64, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: router(x).top_scores, x)


def test_no_tokens():
    choice = build()(tokens(num_tokens=0))
    assert choice.top_scores.shape == choice.selected_experts_indices.shape == (0, K)


def test_a_recomputation_is_recorded_too():
    router = build()
    router.record = []
    x = tokens().requires_grad_()
    checkpoint(lambda x: router(x).top_scores, x, use_reentrant=False).sum().backward()
    first, second = router.record
    assert torch.equal(first, second)


def test_compile_takes_it_whole():
    router = build(score_func="sigmoid", **OUR_GROUPS, route_norm=True)
    bias = torch.randn(E)

    def forward(x):
        choice = router(x, bias)
        return choice.top_scores, choice.selected_experts_indices

    eager = forward(tokens())
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(tokens())
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
