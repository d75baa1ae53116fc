"""Experts in float8 on Hopper's products, and the kernels that quantize for them.

`python -m pytest tests/gpu_tests/test_float8_experts.py` on a machine with such a GPU.
"""

import pytest
import torch

from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.experts import GATINGS, GroupedExperts
from torchtitan.models.moe.moe import MoE
from torchtitan.ops import float8
from torchtitan.ops.float8 import Quantized
from torchtitan.ops.quantized_kernels import EMULATED
from torchtitan.ops.rows import take_rows

CUDA = torch.device("cuda")
HAS_FLOAT8 = torch.cuda.is_available() and float8.has_float8(CUDA)
pytestmark = pytest.mark.skipif(not HAS_FLOAT8, reason="needs a GPU with compute capability 9.0")
RECIPES = ("float8_rowwise", "float8_rowwise_with_gw_hp")
SHAPES = {  # D, F, e, and rows of each expert: few and many, least and empty but for rows of zeros
    "qwen3 30B-A3B": (2048, 768, 16, [16, 528, 1024, 16] * 4),
    "deepseek_v3 16B": (2048, 1408, 8, [16, 2048, 32, 784] * 2),
    "small": (64, 32, 4, [16, 48, 16, 160]),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is full of NaN: whatever reads a row that nothing wrote, shows it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=CUDA).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, std=1.0, seed=0):
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(shape, device=CUDA, generator=generator).mul(std).bfloat16()


def near(actual, expected, tolerance):
    assert actual.shape == expected.shape and actual.isfinite().all()
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm(), error / expected.double().norm()


@pytest.mark.parametrize("shape", [(37, 2048), (16, 48), (5, 5000), (0, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_quantized_as_on_a_cpu(shape, dtype):
    x = (normal(*shape).float() * torch.logspace(-20, 20, shape[0], device=CUDA)[:, None]).to(dtype)
    x[::4] = 0
    data, scale = float8.quantize_rows(x)
    expected = float8.quantize(x.cpu(), 1)
    torch.testing.assert_close(scale.cpu(), expected.scale, rtol=0, atol=0)
    torch.testing.assert_close(data.cpu().float(), expected.data.float(), rtol=0, atol=0)


def test_what_is_not_finite_stays_visible():
    x = torch.ones(3, 64, device=CUDA)
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    back = float8.dequantize(Quantized(*float8.quantize_rows(x)), x.dtype)
    assert (back[0] == 1).all() and not back[1, 5].isfinite() and not back[2, 6].isfinite()


def test_columns_of_groups_and_of_matrices_are_quantized_as_on_a_cpu():
    from torchtitan.ops import float8_triton

    counts = torch.tensor([48, 16, 0, 160], device=CUDA)
    x = torch.cat([normal(224, 208), torch.full((16, 208), float("nan"), device=CUDA).bfloat16()])
    quantized = float8_triton.quantize_group_columns(x, counts)
    expected = float8.quantize_group_columns(x.cpu(), counts.cpu())
    torch.testing.assert_close(quantized.scale.cpu(), expected.scale, rtol=0, atol=0)
    assert torch.equal(quantized.data[:224].cpu().float(), expected.data[:224].float())
    for matrices in (normal(3, 48, 208), normal(3, 208, 48).mT):
        quantized, expected = float8_triton.quantize_matrices(matrices), float8.quantize(matrices.cpu(), 1)
        assert quantized.data.mT.is_contiguous()
        torch.testing.assert_close(quantized.scale.cpu(), expected.scale.squeeze(1), rtol=0, atol=0)
        assert torch.equal(quantized.data.cpu().float(), expected.data.float())


def test_rows_are_taken_and_gaps_are_zeros():
    x, index = normal(7, 96), torch.tensor([3, -1, 0, 6, -1], device=CUDA)
    out = take_rows(x, index)
    assert torch.equal(out[[0, 2, 3]], x[[3, 0, 6]]) and (out[[1, 4]] == 0).all()


def run_experts(backend, shape, dtype, activation, unused=32):
    dim, hidden, num_experts, counts = shape
    bias = activation == "gpt_oss"
    with CUDA:
        experts = GroupedExperts(dim, hidden, num_experts, 0.02, backend, activation=activation, bias=bias)
    for i, weight in enumerate(experts.parameters()):
        weight.data = normal(*weight.shape, std=0.03, seed=i).to(dtype)
    rows = normal(sum(counts) + unused, dim, seed=9).to(dtype)
    upstream = normal(*rows.shape, seed=8).to(dtype)
    scores = torch.rand(len(rows), device=CUDA, generator=torch.Generator(CUDA).manual_seed(7))
    start = 0
    for count in counts:  # the least groups are rows of zeros, as the dispatcher makes of empty ones
        if count == 16:
            rows[start : start + 16], scores[start : start + 16], upstream[start : start + 16] = 0, 0, 0
        start += count
    rows[start:], upstream[start:] = float("nan"), float("nan")
    leaves = [rows.requires_grad_(), scores.requires_grad_(), *experts.parameters()]
    out = experts(rows, torch.tensor(counts, device=CUDA), scores)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)], start


@pytest.mark.parametrize("activation", GATINGS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_experts_equal_their_emulation_and_are_near_to_fp64(shape, recipe, activation):
    """Emulation sums the same float8 numbers in fp32, hardware in fewer bits."""
    actual, used = run_experts(recipe, shape, torch.bfloat16, activation)
    emulated, _ = run_experts(f"{EMULATED}{recipe}", shape, torch.bfloat16, activation)
    exact, _ = run_experts("auto", shape, torch.float64, activation)
    for mine, same, theirs in zip(actual, emulated, exact, strict=True):
        near(mine, same, 0.05)
        near(mine, theirs, 0.15)
    for by_row in actual[:3]:
        assert (by_row[used:] == 0).all()
    for weight in actual[3:5]:  # experts that had rows of zeros alone
        empty = [i for i, count in enumerate(shape[3]) if count == 16]
        assert (weight[empty] == 0).all()


def build_moe(recipe=None, **options):
    config = MoEConfig(num_experts=16, top_k=4, ffn_dim=256, route_norm=True, **options)
    moe = MoE(512, config, residual_std=0.02).to(CUDA, torch.bfloat16)
    for i, weight in enumerate(moe.parameters()):
        weight.data = normal(*weight.shape, std=0.04, seed=i)
    moe.fill_buffers(CUDA)
    if recipe:
        moe.quantize_experts(recipe)
    return moe


def step(layer, moe, num_tokens):
    x = normal(1, num_tokens, 512, seed=5).requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *moe.parameters()], torch.ones_like(out))]


@pytest.mark.parametrize("num_tokens", [0, 1, 777])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_takes_any_number_of_tokens(recipe, num_tokens):
    exact = step(moe := build_moe(), moe, num_tokens)
    for mine, theirs in zip(step(moe := build_moe(recipe), moe, num_tokens), exact, strict=True):
        near(mine, theirs, 0.15)


def test_a_compiled_layer_is_the_same():
    moe = build_moe(RECIPES[0])
    eager = step(moe, moe, 777)
    for mine, theirs in zip(step(torch.compile(moe, fullgraph=True), moe, 777), eager, strict=True):
        near(mine, theirs, 0.05)  # inductor rounds in other places


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_waits_for_the_device(recipe):
    torch.use_deterministic_algorithms(False)  # which may wait, and which few runs ask for
    moe = build_moe(recipe)
    step(moe, moe, 512)  # compiles kernels, and asks what the device can
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(moe, moe, 512)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_exact_weight_gradients_allow_chunks():
    recipe = "float8_rowwise_with_gw_hp"
    whole = step(moe := build_moe(recipe), moe, 333)
    chunks = step(moe := build_moe(recipe, max_rows_per_chunk=64), moe, 333)
    for mine, theirs in zip(chunks, whole, strict=True):
        near(mine, theirs, 0.01)
