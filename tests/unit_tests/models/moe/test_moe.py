"""A whole MoE layer with experts on one rank, against a loop over tokens in fp64.

B batch, L sequence, D model, F expert width, E experts, K top-k.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from tests.unit_tests.models.helpers import saved_bytes
from torchtitan.models.init import parameter_inits
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.moe import MoE
from torchtitan.routing_decisions import decide_once

D, WIDTH, E, K = 16, 24, 8, 3
CONFIG = {"num_experts": E, "top_k": K, "ffn_dim": WIDTH}


def build(dtype=torch.float64, **config):
    moe = MoE(D, MoEConfig(**CONFIG | config), residual_std=0.02)
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / 2
    moe.fill_buffers(torch.device("cpu"))
    return moe


def hidden_states(batch, length, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D, generator=generator).to(dtype).requires_grad_()


def token_by_token(moe, config, x):
    """The layer's definition, one token after the other, in fp64 under autograd."""
    weights = {name: weight.double() for name, weight in moe.named_parameters()}
    out = []
    for token in x.double().reshape(-1, D):
        logits = weights["router.gate.weight"] @ token
        scores = logits.softmax(0) if config.score_func == "softmax" else logits.sigmoid()
        bias = 0 if moe.expert_bias is None else moe.expert_bias
        chosen = (scores + bias).topk(K).indices
        scores = scores[chosen]
        scores = scores / scores.sum() if config.route_norm else scores
        y = torch.zeros(D, dtype=torch.float64)
        for expert, score in zip(chosen, scores * config.route_scale, strict=True):
            before, after = (score, 1) if config.score_before_experts else (1, score)
            gate, up = weights["experts.w13"][expert] @ (token * before)
            y = y + weights["experts.w2"][expert] @ (F.silu(gate) * up) * after
        if config.num_shared_experts:
            w1, w2, w3 = (weights[f"shared_experts.w{i}.weight"] for i in (1, 2, 3))
            y = y + w2 @ (F.silu(w1 @ token) * (w3 @ token))
        out.append(y)
    return torch.stack(out).view(x.shape) if out else x.double() * 0


CASES = {
    "softmax": {},
    "softmax, normalised": {"route_norm": True},
    "softmax, normalised, biased, scaled": {
        "load_balance_coeff": 1e-3, "route_norm": True, "route_scale": 2.5,
    },
    "sigmoid, biased, scaled": {
        "score_func": "sigmoid", "load_balance_coeff": 1e-3, "route_norm": True, "route_scale": 2.5,
    },
    "shared experts": {"num_shared_experts": 2},
    "score before": {"score_before_experts": True, "num_shared_experts": 1},
    "reference": {"experts_backend": "reference", "num_shared_experts": 1},
    "chunks": {"max_rows_per_chunk": 5},
    "chunks, score before": {"max_rows_per_chunk": 5, "score_before_experts": True},
}  # fmt: skip


@pytest.mark.parametrize("batch, length", [(2, 7), (1, 1), (3, 4)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_equal_a_loop_over_tokens(case, dtype, tolerance, batch, length):
    moe = build(dtype, **case)
    if moe.expert_bias is not None:
        moe.expert_bias = torch.linspace(-0.5, 0.5, E)
    x = hidden_states(batch, length, dtype)
    leaves = [x, *moe.parameters()]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    out, expected = moe(x), token_by_token(moe, MoEConfig(**CONFIG | case), x)
    assert out.shape == x.shape and out.dtype == dtype
    ours = [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]
    plain = [expected, *torch.autograd.grad(expected, leaves, upstream.double())]
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_gpt_oss_equals_transformers():
    moe = build(
        torch.float32, activation="gpt_oss", experts_bias=True, router_bias=True,
        score_chosen_only=True,
    )  # fmt: skip
    shape = {"hidden_size": D, "intermediate_size": WIDTH, "num_attention_heads": 4}
    theirs = GptOssMLP(GptOssConfig(**shape, num_local_experts=E, num_experts_per_tok=K))
    router, experts = moe.router.gate, moe.experts
    theirs.router.weight.data, theirs.router.bias.data = router.weight.data, router.bias.data
    # (E, 2, F, D) to (E, D, 2F) with gate and up in turns.
    theirs.experts.gate_up_proj.data = experts.w13.data.transpose(1, 2).flatten(1, 2).mT
    theirs.experts.gate_up_proj_bias.data = experts.b13.data.transpose(1, 2).flatten(1)
    theirs.experts.down_proj.data = experts.w2.data.mT
    theirs.experts.down_proj_bias.data = experts.b2.data
    x = 3 * hidden_states(2, 7, torch.float32).detach()  # some activations beyond the limit
    x.requires_grad_()
    upstream = torch.randn(x.shape)
    ours, plain = moe(x), theirs(x)[0].view_as(x)
    torch.testing.assert_close(ours, plain)
    mine = torch.autograd.grad(ours, [x, router.weight, experts.b2, experts.w2], upstream)
    down = theirs.experts.down_proj_bias, theirs.experts.down_proj
    other = torch.autograd.grad(plain, [x, theirs.router.weight, *down], upstream)
    for a, b in zip(mine, (*other[:3], other[3].mT), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_tokens_give_zero_gradients(case):
    moe = build(torch.float32, **case)
    x = hidden_states(2, 0, torch.float32)
    out = moe(x)
    assert out.shape == (2, 0, D)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all((parameter.grad == 0).all() for parameter in moe.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compile_takes_it_whole(dtype):
    moe = build(dtype, num_shared_experts=1, load_balance_coeff=1e-3)
    x = hidden_states(2, 7, dtype)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    results = [
        (out, *torch.autograd.grad(out.float().square().sum(), [x, *moe.parameters()]))
        for out in (compiled(x), moe(x))
    ]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
    assert moe.tokens_per_expert.sum() == 2 * 14 * K


def test_load_is_counted_in_training_only():
    moe = build()
    moe.router.record = []
    for seed in range(3):
        moe(hidden_states(2, 7, seed=seed))
    ids = torch.cat(moe.router.record).flatten()
    assert torch.equal(moe.tokens_per_expert, ids.bincount(minlength=E))
    moe.eval()
    moe(hidden_states(2, 7))
    assert moe.tokens_per_expert.sum() == 3 * 14 * K


def test_a_recomputation_neither_counts_nor_chooses_again():
    moe, plain = build(), build()
    x = hidden_states(2, 7)
    calls = []

    def with_noise(gate, inputs, logits):
        calls.append(logits)
        return logits + torch.randn_like(logits) if len(calls) > 1 else logits

    moe.router.gate.register_forward_hook(with_noise)
    out = checkpoint(moe, x, use_reentrant=False, context_fn=decide_once)
    gradients = torch.autograd.grad(out.square().sum(), [x, *moe.parameters()])
    assert len(calls) == 2
    expected = plain(x)
    plain_gradients = torch.autograd.grad(expected.square().sum(), [x, *plain.parameters()])
    assert torch.equal(out, expected)
    assert torch.equal(moe.tokens_per_expert, plain.tokens_per_expert)
    for mine, theirs in zip(gradients, plain_gradients, strict=True):
        assert torch.equal(mine, theirs)


def test_buffers_start_empty_and_every_weight_is_drawn():
    with torch.device("meta"):
        moe = MoE(D, MoEConfig(**CONFIG, load_balance_coeff=1e-3, num_shared_experts=1), 0.02)
    moe.to_empty(device="cpu")
    moe.fill_buffers(torch.device("cpu"))
    assert (moe.tokens_per_expert == 0).all() and (moe.expert_bias == 0).all()
    assert moe.tokens_per_expert.dtype == torch.int64
    assert parameter_inits(moe).keys() == dict(moe.named_parameters()).keys()
    assert "expert_bias" in moe.state_dict() and "tokens_per_expert" not in moe.state_dict()


KEPT = {  # bytes besides, of each routed row, and numbers of fp32 of each token
    "softmax, normalised": ({"route_norm": True}, 0, 0),
    "softmax": ({}, 0, E),  # of all experts
    "softmax of the chosen": ({"score_chosen_only": True}, 0, 0),
    "sigmoid": ({"score_func": "sigmoid"}, 0, 0),
    "sigmoid, normalised": ({"score_func": "sigmoid", "route_norm": True}, 4, 1),
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("config, of_row, of_token", KEPT.values(), ids=KEPT)
def test_backward_keeps_the_preactivation_and_ten_bytes_a_routed_row(config, of_row, of_token, biased):
    """The row's place (4), its score (4) and its expert (2), beside the layer's input."""
    moe = build(torch.bfloat16, load_balance_coeff=1e-3 if biased else 0.0, **config)
    x = hidden_states(5, 40, torch.bfloat16)
    saved = saved_bytes(lambda: moe(x), x, *moe.parameters())
    of_rows = 5 * 40 * K * (4 * WIDTH + 10 + of_row)
    assert saved == of_rows + 5 * 40 * 4 * of_token + moe.tokens_per_expert.nbytes


def test_a_compiled_layer_keeps_no_more():
    moe, x = build(torch.bfloat16, route_norm=True), hidden_states(5, 40, torch.bfloat16)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager_decomp_partition")
    saved = saved_bytes(lambda: compiled(x), x, *moe.parameters())
    assert saved == 5 * 40 * K * (4 * WIDTH + 10) + moe.tokens_per_expert.nbytes
