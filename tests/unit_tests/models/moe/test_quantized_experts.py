"""Experts in emulated float8 and MX: near to fp64, and what fills groups or follows them adds nothing.

R rows, D model, F expert width, e experts.
"""

import pytest
import torch

from tests.unit_tests.models.moe.test_experts import (
    GPT_OSS,
    assert_close,
    build,
    gradients,
    inputs,
    one_by_one,
    poisoned_memory,  # noqa: F401
)
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.dispatch import LocalTokenDispatcher
from torchtitan.models.moe.moe import MoE
from torchtitan.ops import expert_kernels, quantized_kernels
from torchtitan.ops.experts import grouped_experts
from torchtitan.ops.quantized_kernels import EMULATED, RECIPES

DIM, HIDDEN = 32, 64
COUNTS = {"uneven": [32, 64, 96, 32], "least": [32, 32, 32, 32], "all to one": [32, 256, 32, 32]}
FORMS = {"swiglu": {}, "gpt_oss": GPT_OSS}
FLOAT8_ERROR = 0.1
"""Relative L2 of outputs and gradients; each of three products in a row adds some 4 %."""


def weights_and_rows(counts, backend, unused=0, **form):
    """Experts, and rows of which the first of each expert's are numbers and the others zeros."""
    experts = build(torch.float32, DIM, HIDDEN, backend=backend, **form)
    rows, counts, scores = inputs(counts, torch.float32, DIM, unused)
    return experts, rows, counts, scores


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("unused", [0, 32])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_and_gradients_are_near_those_of_fp64(recipe, counts, unused, form):
    experts, rows, counts, scores = weights_and_rows(counts, f"{EMULATED}{recipe}", unused, **form)
    leaves = [rows, scores, *experts.parameters()]
    upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    upstream[len(rows) - unused :] = float("nan")
    actual = gradients(experts(rows, counts, scores), leaves, upstream)
    exact = [leaf.detach().double().nan_to_num(0).requires_grad_() for leaf in leaves]
    plain = one_by_one(exact[0], counts, exact[1], experts.gating, *exact[2:])
    expected = gradients(plain, exact, upstream.nan_to_num(0))
    assert_close(actual, expected, FLOAT8_ERROR)
    assert (actual[0] - expected[0]).norm() > 1e-3 * expected[0].norm()  # it does round
    for by_row in actual[:3]:
        assert (by_row[len(rows) - unused :] == 0).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_product_is_of_rounded_factors(recipe):
    """By hand, with the rounding of each factor where it is multiplied."""
    experts, rows, counts, _ = weights_and_rows([32, 64, 32, 32], f"{EMULATED}{recipe}")
    made = RECIPES[recipe]
    leaves = [rows, *experts.parameters()]
    upstream = torch.randn(rows.shape)
    actual = gradients(experts(rows, counts), leaves, upstream)
    exact = expert_kernels.GROUPED_MM
    w13, w2 = (weight.detach() for weight in experts.parameters())
    with torch.no_grad():
        product = lambda a, b: exact.rows(made.rounded(a), made.rounded(b), counts)
        columns = made.rounded_columns or (lambda x, counts: x)
        outer = lambda a, b: exact.weights(columns(a, counts), columns(b, counts), counts)
        z = product(rows, w13.flatten(1, 2).mT)
        gate, up = z.chunk(2, 1)
        act = torch.nn.functional.silu(gate) * up
        y = product(act, w2.mT)
        d_act, sigmoid = product(upstream, w2), gate.sigmoid()
        d_gate = d_act * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        d_z = torch.cat([d_gate, d_act * gate * sigmoid], 1)
        d_w13 = outer(d_z, rows).view_as(w13)
        expected = [y, product(d_z, w13.flatten(1, 2)), d_w13, outer(upstream, act)]
    assert_close(actual, [x.double() for x in expected], 1e-3)  # rounding may go the other way


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_biases_are_exact_sums(recipe):
    experts, rows, counts, scores = weights_and_rows([32, 64, 32, 32], f"{EMULATED}{recipe}", **GPT_OSS)
    upstream = torch.randn(rows.shape)
    [d_b2] = gradients(experts(rows, counts, scores), [experts.b2], upstream)[1:]
    of_rows = (upstream * scores.detach().unsqueeze(1)).split(counts.tolist())
    assert_close([d_b2], [torch.stack([part.double().sum(0) for part in of_rows])], 1e-6)


def moe(backend="auto", **config):
    layer = MoE(DIM, MoEConfig(num_experts=8, top_k=3, ffn_dim=HIDDEN, **config), residual_std=0.02)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    layer.fill_buffers(torch.device("cpu"))
    layer.quantize_experts(backend)
    return layer


def tokens(batch, length):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, DIM, generator=generator).requires_grad_()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("batch, length", [(2, 7), (1, 1), (1, 0), (3, 40)])
def test_rows_that_fill_groups_change_no_bit(batch, length, before, form):
    """The same layer with and without such rows; its experts' bits do not depend on their number."""
    bias = {"experts_bias": True, "activation": "gpt_oss"} if form == "gpt_oss" else {}
    layers = [moe("reference", score_before_experts=before, **bias) for _ in range(2)]
    layers[1].dispatcher.row_alignment = 16
    results = []
    for layer in layers:
        x = tokens(batch, length)
        out = layer(x)
        leaves = [x, *layer.parameters()]
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves), layer.tokens_per_expert])
    for plain, aligned in zip(*results, strict=True):
        assert torch.equal(plain, aligned)


def test_what_experts_make_of_gaps_is_never_read():
    plain, aligned = LocalTokenDispatcher(8, False), LocalTokenDispatcher(8, False, row_alignment=16)
    x, scores = tokens(1, 33)[0], torch.rand(33, 3)
    ids = torch.rand(33, 8, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :3]
    rows, _, metadata = plain.dispatch(x, scores, ids)
    expected = plain.combine(rows, metadata, x)
    rows, counts, metadata = aligned.dispatch(x, scores, ids)
    gaps = metadata.order.tokens < 0
    assert len(rows) - gaps.sum() == 3 * 33 and (counts % 16 == 0).all()
    assert (rows[gaps] == 0).all() and (metadata.routed_scores[gaps] == 0).all()
    y = rows.detach().masked_fill(gaps.unsqueeze(1), float("nan")).requires_grad_()
    out = aligned.combine(y, metadata, x)
    assert torch.equal(out, expected)
    [gradient] = torch.autograd.grad(out.sin().sum(), y)
    assert gradient.isfinite().all() and (gradient[gaps] == 0).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("length", [0, 1, 33])
def test_a_layer_computes_in_few_bits_what_it_does_in_many(recipe, length):
    layers = [moe(backend, route_norm=True) for backend in ("auto", f"{EMULATED}{recipe}")]
    results = []
    for layer in layers:
        x = tokens(1, length)
        out = layer(x)
        results.append(gradients(out, [x, *layer.parameters()], torch.ones_like(out)))
    (loads, same) = (layer.tokens_per_expert for layer in layers)
    assert torch.equal(loads, same) and loads.sum() == 3 * length
    assert_close(results[1], results[0], FLOAT8_ERROR)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_chunks_change_nothing_where_weight_gradients_are_exact(form):
    results = []
    for size in (0, 16, 48):
        experts, rows, counts, scores = weights_and_rows(
            [32, 64, 0, 32], "emulated_float8_rowwise_with_gw_hp", 16, max_rows_per_chunk=size, **form
        )
        upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
        leaves = [rows, scores, *experts.parameters()]
        results.append(gradients(experts(rows, counts, scores), leaves, upstream))
    for chunked in results[1:]:
        assert_close(chunked, results[0], 1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_operator_is_well_formed_and_compiles_whole(recipe):
    experts, rows, counts, scores = weights_and_rows([32, 64, 32, 32], f"{EMULATED}{recipe}", **GPT_OSS)
    weights = (experts.w13, experts.w2, experts.b13, experts.b2)
    options = ([1.702, 7.0, 1.0], experts.backend, 0)
    torch.library.opcheck(grouped_experts, (rows, *weights, counts, scores, None, len(rows), *options))
    layer, x = moe(f"{EMULATED}{recipe}"), tokens(2, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    results = [gradients(f(x), [x, *layer.parameters()], torch.ones_like(x)) for f in (layer, compiled)]
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_waits_for_the_device(recipe, monkeypatch):
    layer, x = moe(f"{EMULATED}{recipe}"), tokens(2, 7)
    layer(x)

    def refuse(*args):
        raise AssertionError("a value was read on the host")

    for reader in ["tolist", "item", "cpu", "__int__", "__index__", "__float__"]:
        monkeypatch.setattr(torch.Tensor, reader, refuse)  # __bool__: sum_rows asks on CPUs alone
    out = layer(x)
    torch.autograd.backward(out, torch.ones_like(out))


def test_backends_say_how_rows_are_aligned():
    assert [quantized_kernels.row_alignment(name) for name in ("auto", "reference")] == [1, 1]
    for name, recipe in RECIPES.items():
        for backend in (name, f"{EMULATED}{name}"):
            assert quantized_kernels.row_alignment(backend) == recipe.alignment
