"""float8 products on a GPU that has them: of compiled layers, and of the output head.

`python -m pytest tests/gpu_tests/test_float8.py`
"""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from torchtitan.config.manager import load_config
from torchtitan.models.registry import model_config
from torchtitan.ops import cross_entropy, float8
from torchtitan.ops.cross_entropy import EXACT, IGNORE_INDEX, chunked_linear_cross_entropy, cross_entropy_
from torchtitan.ops.float8_head import GRADIENT_SCALE
from torchtitan.ops.float8_head import products as head_products
from torchtitan.quantization.converters import check_device, convert


def _missing() -> str:
    if importlib.util.find_spec("torchao") is None:
        return "needs torchao"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        return "needs a GPU of compute capability 8.9 (float8 products)"
    return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing())
FLOAT8 = "quantize.linear.float8"
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
ROWS, IN, OUT = 512, 1024, 2048


def config_of(recipe, *argv):
    float8 = [f"--model.converters={FLOAT8}", f"--{FLOAT8}.recipe_name={recipe}"] if recipe else []
    return load_config(["--training.seq_len=256", "--training.local_batch_size=4", *float8, *argv])


def converted(layer, recipe, *argv):
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    config = config_of(recipe, *argv)
    convert(model, config)
    assert type(model["layer"]).__name__ == "Float8Linear"
    return model["layer"]


def products(layer, x, upstream):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(upstream)
    return y.detach(), x.grad, layer.weight.grad.clone()


def error(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


@pytest.mark.parametrize(
    ("recipe", "rows"), [*((recipe, ROWS) for recipe in RECIPES), ("tensorwise", ROWS - 5)]
)
def test_compiled_products_are_within_float8s_error(recipe, rows):
    """Numbers of 3 bits of mantissa (gradients of tensorwise: 2) are off by 2 to 5 % on average."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, IN, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(rows, OUT, device="cuda", dtype=torch.bfloat16)
    odd = ["--training.seq_len=507", "--training.local_batch_size=1"] if rows % 16 else []
    float8 = converted(layer, recipe, *odd)
    exact = products(layer, x, upstream)
    found = products(torch.compile(float8, fullgraph=True), x, upstream)
    eager = products(float8, x, upstream)
    for ours, theirs in zip(found, exact, strict=True):
        assert error(ours, theirs) < 0.08
    assert error(found[0], exact[0]) > 0.01  # it did round
    for ours, theirs in zip(found, eager, strict=True):
        assert error(ours, theirs) < 2e-2


def train(recipe, steps=20):
    """Losses of a small model on new batches of few frequent tokens; in float8 its blocks are compiled.

    On one batch, learnt by heart, small differences would grow from step to step.
    """
    config = config_of(recipe, "--model.flavor=debugmodel", "--model.overrides.n_layers=2")
    if recipe:
        check_device(config, torch.device("cuda"))
    model = model_config("llama3", "debugmodel", config.model.overrides).update_from_config(config).build()
    if recipe:
        [done] = convert(model, config)
        assert "output" in done.converted
    torch.manual_seed(0)
    for weight in model.parameters():
        nn.init.ones_(weight) if weight.ndim == 1 else nn.init.normal_(weight, std=0.02)
    model = model.to("cuda", torch.bfloat16)
    model.fill_buffers(torch.device("cuda"))
    for block in model.layers.values() if recipe else ():
        block.forward = torch.compile(block.forward, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        tokens = (2048 * torch.rand(4, 257, device="cuda") ** 4).long()
        loss = model(tokens[:, :-1], tokens[:, 1:].contiguous()) / tokens[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_stay_in_the_band_of_bfloat16():
    exact = train("")
    assert exact[-1] < exact[0] - 1  # it learns
    for recipe in RECIPES:
        ours = train(recipe)
        assert ours == pytest.approx(exact, rel=5e-3), recipe  # emulated: 2e-3
        assert ours != exact


def scales(x, *dims):
    return float8.inverse_scale(x.abs().amax(dims, keepdim=True))


@pytest.mark.parametrize("shape", [(16, 48), (48, 208), (272, 4112), (1040, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_both_sides_are_written_as_on_a_cpu(kind, dtype, shape):
    sizes = torch.logspace(-4, 4, shape[0], device="cuda")[:, None]
    x = (torch.randn(shape, device="cuda") * sizes).to(dtype)
    x[5] = 0
    row, column, one = scales(x, 1), scales(x, 0), scales(x, 0, 1)
    for by_rows, by_columns in ((one, one), (row, column), (row, one), (row, None)):
        found = float8.quantize_sides(x, by_rows, by_columns, kind)
        on_cpu = (None if scale is None else scale.cpu() for scale in (by_rows, by_columns))
        expected = float8.quantize_sides(x.cpu(), *on_cpu, kind)
        for ours, theirs in zip(found, expected, strict=True):
            if theirs is None:
                assert ours is None
            else:
                assert ours.is_contiguous() and torch.equal(ours.cpu().float(), theirs.float())


@pytest.mark.parametrize("vocab", [48, 9008, 128256])
def test_the_losses_gradient_is_written_as_float8_at_once(vocab):
    from torchtitan.ops import triton_loss

    logits = (3 * torch.randn(144, vocab, device="cuda")).bfloat16()
    labels = torch.randint(vocab, (144,), device="cuda")
    labels[7] = IGNORE_INDEX
    before, gradient = logits.clone(), logits.cpu().double()
    losses, rows, columns = triton_loss.scaled_cross_entropy(
        logits, labels, GRADIENT_SCALE, torch.float8_e5m2
    )
    exact = cross_entropy_(gradient, labels.cpu())  # and the gradient
    assert torch.equal(logits, before) and torch.equal(rows.float(), columns.t().float())
    torch.testing.assert_close(losses.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    # Half a step of e5m2's two bits, or of its smallest number.
    allowed = gradient.abs() * 0.126 + 2.0**-32
    assert ((rows.cpu().double() / GRADIENT_SCALE - gradient).abs() <= allowed).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_shows_in_the_heads_gradients(recipe, bad):
    leaves = head_inputs(64, 128, 512)
    with torch.no_grad():
        leaves[0][3, 5] = bad
    loss, d_hidden, d_weight = head_step(head_products(recipe, emulate=False), leaves)
    assert not loss.isfinite() and not d_hidden.isfinite().all() and not d_weight.isfinite().all()


def of_numbers(side):
    """In fp64, what a side of a matrix stands for."""
    return side.double() if isinstance(side, torch.Tensor) else float8.dequantize(side, torch.float64)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_heads_products_are_those_of_the_rounded_numbers(recipe):
    made = head_products(recipe, emulate=False)
    hidden, weight, labels = head_inputs(1008, 1024, 16416)
    states, weights = (f(x.detach(), True) for f, x in ((made.hidden, hidden), (made.weight, weight)))
    logits = made.logits(states.rows, weights.rows)
    assert error(logits, of_numbers(states.rows) @ of_numbers(weights.rows).t()) < 1e-2  # fast sums
    _, gradient = made.loss(logits, labels, True)
    for a, b in ((gradient.rows, weights.columns), (gradient.columns, states.columns)):
        product = made.gradients(a, b)
        assert product.dtype == torch.bfloat16
        assert error(product, of_numbers(a) @ of_numbers(b).t()) < 5e-3


def head_inputs(tokens, dim, vocab):
    hidden = torch.randn(tokens, dim, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, dim, device="cuda") * dim**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (tokens,), device="cuda")
    labels[1::9] = IGNORE_INDEX
    return hidden, weight, labels


def head_step(made, leaves):
    loss = chunked_linear_cross_entropy(*leaves, made)
    return loss.detach(), *torch.autograd.grad(loss / 7, leaves[:2])


@pytest.mark.parametrize("tokens", [1, 999, 4096])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_heads_gradients_are_within_float8s_error(recipe, tokens, monkeypatch):
    leaves = head_inputs(tokens, 512, 8208)
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 1100 * 8208 * 2)  # the last: in four chunks
    ours, emulated, exact = (
        head_step(made, leaves)
        for made in (head_products(recipe, False), head_products(recipe, True), EXACT)
    )
    assert error(ours[0], exact[0]) < (2e-2 if tokens == 1 else 1e-3)
    for mine, same, theirs in zip(ours, emulated, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert error(mine, theirs) < 0.1 and error(mine, same) < 0.08  # as sums differ, numbers move to the next
    assert error(ours[1], exact[1]) > 0.01  # it did round


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_float8_head_waits_for_nothing(recipe):
    leaves = head_inputs(512, 256, 2048)
    made = head_products(recipe, emulate=False)
    head_step(made, leaves)  # compiles kernels, and asks what the device can
    torch.cuda.set_sync_debug_mode("error")
    try:
        head_step(made, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
