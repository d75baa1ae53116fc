"""The fused products of experts against fp64, and the layer with them against the layer without.

`python -m pytest tests/gpu_tests/test_moe_kernels.py` on a Hopper GPU. The kernels' arithmetic runs on a
CPU, too, where Triton is installed: the same with TRITON_INTERPRET=1 before it.

T tokens, K top-k, R rows, D model, F expert width, E experts.
"""

import os

import pytest
import torch

from torchtitan import routing
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.moe import MoE
from torchtitan.ops.swiglu import Gating, swiglu, swiglu_backward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
pytestmark = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or an interpreter")
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # interpreted products of bf16 are wrong
DIM, HIDDEN = 256, 384  # tiles of 128 and 256: several, and a half one
COUNTS = {
    "uneven": [64, 0, 129, 1, 71],
    "all to one": [0, 0, 300, 0],
    "whole tiles": [128, 256],
    "one row": [0, 1, 0],
    "none": [0, 0],
}
FORMS = {  # gathered, weighted, gating
    "swiglu": (True, True, Gating()),
    "gpt_oss, rows as they are, no scores": (False, False, Gating(1.702, 7.0, 1.0)),
}
TOLERANCE = 5e-3  # of bf16: half a step is 2e-3
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] == 9
REAL = {"q30b": (2048, 768, 128, 8), "ds16b": (2048, 1408, 64, 6)}  # D, F, E, K


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2**20, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def operands(counts, unused=37):
    """x (T, D), index (R,), counts, scores (R,), and the expert of each row; R has `unused` more."""
    num_rows = sum(counts) + unused
    x = torch.randn(97, DIM, device=DEVICE).to(DTYPE)
    index = torch.randint(97, (num_rows,), dtype=torch.int32, device=DEVICE)
    scores = torch.rand(num_rows, device=DEVICE)
    experts = torch.arange(len(counts), device=DEVICE)
    counts = torch.tensor(counts, device=DEVICE)
    experts = experts.repeat_interleave(counts)
    return x, index, counts, scores, experts


def matrices(*shape):
    return torch.randn(shape, device=DEVICE).to(DTYPE) / 16


def products(x, matrices, experts):
    """Each row times its expert's matrix, in fp64."""
    out = x.new_empty(len(experts), matrices.shape[2], dtype=torch.float64)
    for expert in range(len(matrices)):
        mine = experts == expert
        out[mine] = x[: len(experts)][mine].double() @ matrices[expert].double()
    return out


def assert_close(mine, exact, tolerance=TOLERANCE):
    assert mine.shape == exact.shape and mine.isfinite().all()
    assert (mine.double() - exact.double()).norm() <= tolerance * exact.double().norm()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_up_projection(form, counts):
    from torchtitan.ops.triton_products import up

    gathered, weighted, gating = form
    x, index, counts, scores, experts = operands(counts)
    w13, used = matrices(len(counts), 2, HIDDEN, DIM), len(experts)
    scores = scores if weighted else None
    rows = x[index]
    z, act = up(*((x, index) if gathered else (rows, None)), w13, counts, scores, gating)
    assert_close(z[:used], products(rows, w13.flatten(1, 2).mT, experts))
    exact = swiglu(z[:used].double(), scores if scores is None else scores[:used].double(), gating)
    assert_close(act[:used], exact)


@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_rows(counts, by_column):
    from torchtitan.ops.triton_products import rows

    x, index, counts, _, experts = operands(counts)
    a, used = x[index], len(experts)
    a[used:] = float("nan")
    b = matrices(len(counts), HIDDEN, DIM).mT if by_column else matrices(len(counts), DIM, HIDDEN)
    out = rows(a, b, counts)
    assert len(out) == len(a)
    assert_close(out[:used], products(a, b, experts))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_down_projection_backward(form, counts):
    from torchtitan.ops.triton_products import down_backward

    gathered, weighted, gating = form
    d_y, index, counts, scores, experts = operands(counts)
    w2, used = matrices(len(counts), DIM, HIDDEN), len(experts)
    z = 4 * torch.randn(len(index), 2 * HIDDEN, device=DEVICE).to(DTYPE)
    scores = scores if weighted else None
    rows = d_y[index]
    operand = (d_y, index) if gathered else (rows, None)
    results = down_backward(*operand, w2, counts, z, scores, gating)
    exact = swiglu_backward(
        products(rows, w2, experts),
        z[:used].double(),
        None if scores is None else scores[:used].double(),
        gating,
    )
    for mine, theirs in zip(results[: 2 + weighted], exact, strict=False):
        assert_close(mine[:used], theirs)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_weights(counts, transposed):
    from torchtitan.ops.triton_products import weights

    x, index, counts, _, experts = operands(counts)
    used = len(experts)
    b = torch.randn(len(index), HIDDEN, device=DEVICE).to(DTYPE)
    b[used:] = float("nan")
    index[used:] = 2**31 - 1  # nothing may look there
    out = weights(x, index, b, counts, transposed)
    rows = x[index[:used]].double()
    exact = torch.stack(
        [rows[experts == e].T @ b[:used][experts == e].double() for e in range(len(counts))]
    )
    assert_close(out, exact.mT if transposed else exact)


def layer(shape, backend):
    dim, hidden, num_experts, top_k = shape
    config = MoEConfig(num_experts=num_experts, top_k=top_k, ffn_dim=hidden, route_norm=True)
    moe = MoE(dim, config, residual_std=0.02).to(DEVICE, DTYPE)
    moe.fill_buffers(torch.device(DEVICE))
    torch.manual_seed(0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    moe.experts.backend = backend
    return moe


def results(moe, x, upstream):
    x = x.detach().requires_grad_()
    out = moe(x)
    return out.detach(), *torch.autograd.grad(out, [x, *moe.parameters()], upstream)


def exactly(moe, x, upstream, ids):
    """`results` expert by expert in fp64, for the experts that a bf16 layer chose."""
    weights = [parameter.detach().double().requires_grad_() for parameter in moe.parameters()]
    gate, w13, w2 = weights
    tokens = x.detach().double().requires_grad_()
    scores = (tokens[0] @ gate.T).softmax(-1).gather(1, ids)
    scores = scores / scores.sum(-1, keepdim=True)
    out = 0 * tokens[0]  # depends on them, were there none
    for expert in range(len(w13)):
        token, k = (ids == expert).nonzero(as_tuple=True)
        if len(token):
            z = tokens[0, token] @ w13[expert].flatten(0, 1).T
            y = swiglu(z, scores[token, k], Gating()) @ w2[expert].T
            out = out.index_add(0, token, y)
    leaves = [tokens, *weights]
    gradients = torch.autograd.grad(
        out[None], leaves, upstream.double(), allow_unused=True, materialize_grads=True
    )
    return out[None].detach(), *gradients


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("num_tokens", [4096, 333, 1, 0])
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
def test_the_layer_is_right_at_real_widths(shape, num_tokens):
    """Fused and not, deterministic, and no row waits for the host."""
    x = torch.randn(1, num_tokens, shape[0], device=DEVICE, dtype=DTYPE)
    upstream = torch.randn_like(x)
    x = torch.stack([x, x], dim=2)[:, :, 0]  # rows far apart
    moe, unfused = layer(shape, "auto"), layer(shape, "unfused")
    moe.router.record = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        mine, again = results(moe, x, upstream), results(moe, x, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = exactly(moe, x, upstream, moe.router.record[0])
    for one, same, other, expected in zip(
        mine, again, results(unfused, x, upstream), exact, strict=True
    ):
        assert torch.equal(one, same)
        assert_close(one, expected, 1e-2)
        assert_close(other, expected, 1e-2)


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_fused_products_are_chosen_on_hopper():
    from torchtitan.ops.expert_kernels import choose

    device = torch.device("cuda")
    options = torch.bfloat16, device
    assert choose("auto", *options, 768, 2048, fusible=True).up is not None
    assert choose("auto", *options, 768, 2048, fusible=False).up is None
    assert choose("unfused", *options, 768, 2048, fusible=True).up is None
    assert choose("auto", *options, 14336, 4096, fusible=True).up is None
    assert choose("fused", *options, 14336, 4096, fusible=True).up is not None
    assert choose("auto", *options, 760, 2048, fusible=True).up is None
    assert choose("auto", torch.float32, device, 768, 2048, fusible=True).up is None


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("num_experts", [1, 2, 128, 1000])
def test_tokens_are_counted(num_experts):
    ids = torch.randint(num_experts, (1003, 8), device=DEVICE)
    counts = routing.count_tokens(ids, num_experts)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, ids.flatten().bincount(minlength=num_experts))
