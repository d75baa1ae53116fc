"""A forward as a generator calls it: no gradients, whole sequences of any length on every rank."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.distributed_tests.test_data_parallel import build
from tests.distributed_tests.test_moe_layouts import parallel
from torchtitan.distributed.launch import run_ranks
from torchtitan.models import deepseek_v3, qwen3

LENGTHS, BATCHES = (1, 3, 7, 13), (1, 2, 3)
MODELS = [
    replace(flavor.shrunk(tp=4), seq_len=max(LENGTHS))
    for flavor in (qwen3.FLAVORS["debugmodel_moe"], deepseek_v3.FLAVORS["debugmodel"])
]
LAYOUTS = {
    "tp4": (4, parallel(4, sp=False)),
    "tp4 x ep4": (4, parallel(4, 4, sp=False)),
    "tp2 x ep2": (2, parallel(2, 2, sp=False)),
}


def generate(model_config, config):
    """For each length and batch: logits (B, L, V), and the expert ids (T, K) of each layer."""
    _, model = build(model_config, config)
    layers = [layer.moe for layer in model.layers.values() if layer.moe is not None]
    for moe in layers:
        if moe.expert_bias is not None:
            moe.expert_bias.copy_(torch.linspace(-0.01, 0.01, len(moe.expert_bias)))
    draw = torch.Generator().manual_seed(0)
    model.eval()
    found = []
    for length in LENGTHS:
        for batch in BATCHES:
            tokens = torch.randint(model_config.vocab_size, (batch, length), generator=draw)
            for moe in layers:
                moe.router.record = []
            with torch.no_grad():
                logits = model(tokens)
            found.append((logits, [moe.router.record for moe in layers]))
    assert all((moe.tokens_per_expert == 0).all() for moe in layers)  # evaluation is no load
    return found


def generate_all(config):
    return [generate(model, config) for model in MODELS]


@pytest.fixture(scope="module")
def alone():
    return run_ranks(generate_all, 1, parallel())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_row_is_what_one_process_returns(alone, name):
    for rank in run_ranks(generate_all, *LAYOUTS[name], timeout=120):
        for mine, theirs in zip(rank, alone, strict=True):
            for (logits, ids), (expected, expected_ids) in zip(mine, theirs, strict=True):
                assert logits.shape == expected.shape
                error = (logits - expected).norm(dim=-1)
                assert (error <= 1e-5 * expected.norm(dim=-1)).all()
                torch.testing.assert_close(ids, expected_ids, rtol=0, atol=0)


def routed_rows(model_config, config, sizes):
    """Outputs (T, D) and gradients of the first T tokens in the experts of one layer, for each T.

    Ranks that hold a slice each, add up to the whole.
    """
    degrees, model = build(replace(model_config, moe=_reference(model_config.moe)), config)
    model(torch.zeros(1, 1, dtype=torch.int64))  # experts are inside of FSDP's model
    moe = model.layers[str(model_config.n_layers - 1)].moe
    moe.shared_experts = None
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(max(sizes), model_config.dim, generator=draw)
    scores = torch.rand(max(sizes), model_config.moe.top_k, generator=draw)
    order = torch.rand(max(sizes), model_config.moe.num_experts, generator=draw).argsort(1)
    ids = order[:, : model_config.moe.top_k].contiguous()
    found = []
    for size in sizes:
        leaves = x[:size].clone().requires_grad_(), scores[:size].clone().requires_grad_()
        out = moe.apply_experts(*leaves, ids[:size])
        results = [out.detach().clone(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]
        for result in results if degrees.tp > 1 else ():
            dist.all_reduce(result)
        found.append(results)
    return found


def _reference(moe):
    return replace(moe, experts_backend="reference")


def routed_rows_of_all(config, sizes):
    return [routed_rows(model, config, sizes) for model in MODELS]


@pytest.mark.parametrize("name", ["tp4 x ep4", "tp2 x ep2"])
def test_no_padding_changes_a_bit_of_the_reference_experts_rows(name):
    """Each token's row and gradients are the same in any batch: none, or 1 to 3 rows of padding."""
    sizes = range(1, 14)
    [alone] = run_ranks(routed_rows_of_all, 1, parallel(), [max(sizes)])
    for rank in run_ranks(routed_rows_of_all, *LAYOUTS[name], sizes, timeout=120):
        for mine, [whole] in zip(rank, alone, strict=True):
            for size, results in zip(sizes, mine, strict=True):
                for result, expected in zip(results, whole, strict=True):
                    assert torch.equal(result, expected[:size]), size
