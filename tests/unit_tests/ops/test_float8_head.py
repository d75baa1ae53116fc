"""The head's products in float8: near to fp32's, of the numbers that their recipe says, the same in chunks."""

from dataclasses import replace

import pytest
import torch

from torchtitan.ops import cross_entropy, float8
from torchtitan.ops.cross_entropy import EXACT, IGNORE_INDEX, chunked_linear_cross_entropy
from torchtitan.ops.float8_head import RECIPES, products

TOKENS, DIM, VOCAB = 77, 64, 320
ON_CPUS = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")  # 2.13; not 2.11
on_the_device = pytest.mark.skipif(not ON_CPUS, reason="this torch has no float8 products for CPUs")
KINDS = [pytest.param(True, id="emulated"), pytest.param(False, id="of the device", marks=on_the_device)]
POWERS_OF_TWO = torch.logspace(-30, 30, 61, base=2)


def inputs(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, TOKENS // 7, DIM, generator=generator)
    weight = torch.randn(VOCAB, DIM, generator=generator) * DIM**-0.5
    labels = torch.randint(VOCAB, (7, TOKENS // 7), generator=generator)
    labels[0, 2], labels[2] = IGNORE_INDEX, IGNORE_INDEX
    return hidden.to(dtype), weight.to(dtype), labels


def results(made, leaves, monkeypatch, rows=None):
    """Loss and gradients of hidden and weight, with so many tokens a chunk."""
    hidden, weight = (x.clone().requires_grad_() for x in leaves[:2])
    if rows:
        monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", rows * VOCAB * weight.itemsize)
    loss = chunked_linear_cross_entropy(hidden, weight, leaves[2], made)
    return loss.detach(), *torch.autograd.grad(loss / 7, (hidden, weight))


def error(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("emulate", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_within_float8s_error(recipe, emulate, dtype, monkeypatch):
    leaves = inputs(dtype)
    ours = results(products(recipe, emulate), leaves, monkeypatch)
    exact = results(EXACT, [leaves[0].float(), leaves[1].float(), leaves[2]], monkeypatch)
    assert error(ours[0], exact[0]) < 2e-3
    assert 0.01 < error(ours[1], exact[1]) < 0.05
    exact_product = recipe == "rowwise_with_gw_hp"  # but of rounded logits
    assert 0.002 < error(ours[2], exact[2]) < (0.01 if exact_product else 0.05)
    assert [grad.dtype for grad in ours[1:]] == [dtype] * 2
    assert (ours[1][2] == 0).all()  # no label is valid there


def squared(x, y):
    return x.double() @ y.double().t()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_products_are_those_of_the_rounded_numbers(recipe, monkeypatch):
    """Written out once more, in fp64, by the recipe's table in docs/low_precision.md."""
    hidden, weight, labels = inputs()
    spread = torch.logspace(-5, 0, DIM)  # small ones show whether a scale is for more than a column
    weight = weight * spread
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    rounded = {
        "tensorwise": (tensor, tensor, lambda x, dim: (x * 2**15).to(torch.float8_e5m2).float() / 2**15),
        "rowwise": (row, row, row),
        "rowwise_with_gw_hp": (
            lambda x, dim: row(x, 1) if dim else x,
            lambda x, dim: row(x, 1) if dim else tensor(x, 0),
            lambda x, dim: row(x, 1) if dim else x,
        ),
    }
    of_hidden, of_weight, of_gradient = rounded[recipe]
    gradient = squared(of_hidden(hidden, 1), of_weight(weight, 1)).float()
    losses = cross_entropy.cross_entropy_(gradient, labels)
    d_hidden = squared(of_gradient(gradient, 1), of_weight(weight, 0).t())
    d_weight = squared(of_gradient(gradient, 0).t(), of_hidden(hidden, 0).t())
    loss, *found = results(products(recipe, True), (hidden, weight, labels), monkeypatch)
    torch.testing.assert_close(loss, losses.sum())
    assert error(found[0] * 7 / spread, d_hidden / spread) < 1e-3  # where sums differ in a bit, a number may move to the next
    assert error(found[1] * 7, d_weight) < 1e-3


def row(x, dim):
    return float8.dequantize(float8.quantize(x, dim), x.dtype)


def tensor(x, dim):
    return row(x.flatten(), 0).view_as(x)


@pytest.mark.parametrize("rows", [16, 33, 64])
@pytest.mark.parametrize("emulate", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_chunks_are_rounded_as_the_whole(recipe, emulate, rows, monkeypatch):
    """All scales are powers of two, so only the sum over chunks differs; on devices they are bfloat16."""
    made, leaves = products(recipe, emulate), inputs()
    whole, chunks = results(made, leaves, monkeypatch), results(made, leaves, monkeypatch, rows)
    assert torch.equal(chunks[0], whole[0]) and torch.equal(chunks[1], whole[1])
    assert error(chunks[2], whole[2]) < (1e-6 if emulate else 5e-3)


def test_chunks_divide_by_what_products_need(monkeypatch):
    made, sizes = products("tensorwise", True), []
    counted = replace(made, hidden=lambda x, needs: sizes.append(len(x)) or made.hidden(x, needs))
    results(counted, inputs(), monkeypatch, rows=33)
    assert sizes == [32, 32, 16]


@on_the_device
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_number_of_tokens_works(recipe, monkeypatch):
    hidden, weight, labels = inputs()
    made = products(recipe, emulate=False)
    for count in (1, 16, 17):
        leaves = hidden.flatten(0, 1)[:count], weight, labels.flatten()[:count]
        ours, exact = (results(how, leaves, monkeypatch) for how in (made, EXACT))
        assert ours[1].shape == (count, DIM)
        assert all(error(a, b) < 0.06 for a, b in zip(ours, exact, strict=True))
    nothing = torch.full_like(labels, IGNORE_INDEX)
    assert not any(found.any() for found in results(made, (hidden, weight, nothing), monkeypatch))


@pytest.mark.parametrize("recipe", RECIPES)
def test_validation_multiplies_the_same_and_rounds_no_gradient(recipe):
    hidden, weight, labels = inputs()
    made = products(recipe, emulate=True)
    trained = chunked_linear_cross_entropy(hidden, weight.requires_grad_(), labels, made)
    forward_only = replace(made, gradients=None)
    with torch.no_grad():
        assert torch.equal(chunked_linear_cross_entropy(hidden, weight, labels, forward_only), trained)
        assert made.loss(torch.randn(16, VOCAB), torch.zeros(16, dtype=torch.int64), False)[1] is None


def test_small_probabilities_are_kept_by_tensorwise():
    gradient = RECIPES["tensorwise"].gradient
    probabilities = POWERS_OF_TWO[POWERS_OF_TWO <= 1].repeat(16, 16)
    back = gradient.emulated(-probabilities, True)
    kept = probabilities >= 2.0**-29
    assert torch.equal(back.rows, back.columns.t())
    assert torch.equal(back.rows[kept], -probabilities[kept])
    nearest = torch.full((16, 16), 0.3)
    assert ((gradient.emulated(nearest, False).rows - nearest).abs() <= nearest / 8).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_shows(recipe, bad, monkeypatch):
    hidden, weight, labels = inputs()
    hidden[1, 3, 5] = bad
    loss, d_hidden, d_weight = results(products(recipe, True), (hidden, weight, labels), monkeypatch)
    assert not loss.isfinite() and not d_hidden.isfinite().all() and not d_weight.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_tokens_at_all_have_no_loss(recipe):
    hidden, weight, _ = inputs()
    hidden = hidden[:0].clone().requires_grad_()
    labels = torch.zeros(0, TOKENS // 7, dtype=torch.int64)
    loss = chunked_linear_cross_entropy(hidden, weight, labels, products(recipe, emulate=True))
    loss.backward()
    assert loss == 0 and hidden.grad.shape == hidden.shape
