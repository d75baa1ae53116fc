"""Grouped experts against each row by itself in fp64, and what else their operator promises.

R rows, D model, F expert width, e experts.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.unit_tests.models.helpers import saved_bytes
from torchtitan import routing
from torchtitan.models.moe.experts import GroupedExperts
from torchtitan.ops import expert_kernels
from torchtitan.ops.experts import _say, grouped_experts, grouped_experts_backward
from torchtitan.ops.swiglu import Gating

COUNTS = {
    "uneven": [3, 0, 5, 1],
    "more than a block": [17, 33, 0, 16],
    "all to one": [0, 7, 0, 0],
    "one row": [0, 0, 0, 1],
    "none": [0, 0, 0, 0],
}
KERNELS = {
    "grouped_mm": ("auto", torch.float32, 16, 24),
    "grouped_mm in bf16": ("auto", torch.bfloat16, 16, 24),
    "loop": ("auto", torch.float64, 16, 24),
    "loop, odd widths": ("auto", torch.float32, 10, 7),
    "reference": ("reference", torch.float32, 10, 7),
    "reference in bf16": ("reference", torch.bfloat16, 16, 24),
}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
GPT_OSS = {"activation": "gpt_oss", "bias": True}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is full of NaN: whatever reads a row that nothing wrote, shows it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert all(torch.empty(3, device=device).isnan().all() for device in DEVICES)
    yield
    torch.use_deterministic_algorithms(False)


def build(dtype=torch.float32, dim=16, hidden=24, num_experts=4, **options):
    experts = GroupedExperts(dim, hidden, num_experts, residual_std=0.02, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / 2
    return experts


def inputs(counts, dtype=torch.float32, dim=16, unused=0, seed=1):
    """Leaves rows (R, D) and scores (R,); the `unused` rows after the counts' sum are NaN."""
    generator = torch.Generator().manual_seed(seed)
    used = sum(counts)
    rows = torch.full((used + unused, dim), float("nan"), dtype=dtype)
    rows[:used] = torch.randn(used, dim, generator=generator)
    scores = torch.rand(used + unused, generator=generator, dtype=torch.float64)
    scores = scores if dtype == torch.float64 else scores.float()
    return rows.requires_grad_(), torch.tensor(counts), scores.requires_grad_()


def gated(gate, up, gating):
    if gating == Gating():
        return F.silu(gate) * up
    gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
    return (up + 1) * gate * torch.sigmoid(gating.alpha * gate)  # transformers' GptOssExperts


def one_by_one(rows, counts, scores, gating, w13, w2, b13=None, b2=None):
    """Each row by itself, in fp64 under autograd."""
    out, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        for row in range(start, start + count):
            gate, up = w13[expert] @ rows[row] + (0 if b13 is None else b13[expert])
            y = w2[expert] @ gated(gate, up, gating) + (0 if b2 is None else b2[expert])
            out.append(y * (1 if scores is None else scores[row]))
        start += count
    out += torch.zeros(len(rows) - start, rows.shape[1])
    return torch.stack(out) if out else torch.zeros_like(rows)


def gradients(out, leaves, upstream):
    """The output and the gradients of `leaves`, all in fp64."""
    of_leaves = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return [tensor.double() for tensor in (out.detach(), *of_leaves)]


def on_device(device, experts, leaves, counts, upstream):
    """`gradients` there of the leaves: rows, perhaps scores, and the experts' weights."""
    experts = copy.deepcopy(experts).to(device)
    weights = list(experts.parameters())
    given = [leaf.detach().to(device).requires_grad_() for leaf in leaves[: -len(weights)]]
    out = experts(given[0], counts.to(device), *given[1:])
    return gradients(out, [*given, *weights], upstream.to(device))


def assert_close(actual, expected, tolerance):
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape and mine.isfinite().all()
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("form", [{}, GPT_OSS], ids=["swiglu", "gpt_oss"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("unused", [0, 5])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("device", DEVICES)
def test_outputs_and_gradients_equal_each_row_by_itself(
    device, kernels, counts, unused, weighted, form
):
    backend, dtype, dim, hidden = kernels
    experts = build(dtype, dim, hidden, backend=backend, **form)
    rows, counts, scores = inputs(counts, dtype, dim, unused)
    leaves = [rows, *([scores] if weighted else []), *experts.parameters()]
    upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    upstream[len(rows) - unused :] = float("nan")
    actual = [tensor.cpu() for tensor in on_device(device, experts, leaves, counts, upstream)]

    exact = [leaf.detach().double().nan_to_num(0).requires_grad_() for leaf in leaves]
    weights = exact[1 + weighted :]
    plain = one_by_one(exact[0], counts, exact[1] if weighted else None, experts.gating, *weights)
    plain = plain + 0 * sum(leaf.sum() for leaf in exact)  # all take part, though no row does
    expected = gradients(plain, exact, upstream.nan_to_num(0))
    assert_close(actual, expected, TOLERANCE[dtype])
    for by_row in actual[: 2 + weighted]:
        assert (by_row[len(rows) - unused :] == 0).all()
    for weight in actual[2 + weighted :]:
        assert (weight[counts == 0] == 0).all()


def test_kernels_are_chosen_by_type_and_width():
    cpu = torch.device("cpu")
    assert expert_kernels.choose("auto", torch.float32, cpu, 16, 24) is expert_kernels.GROUPED_MM
    assert expert_kernels.choose("auto", torch.bfloat16, cpu, 16, 24) is expert_kernels.GROUPED_MM
    assert expert_kernels.choose("auto", torch.bfloat16, cpu, 16, 20) is expert_kernels.LOOP
    assert expert_kernels.choose("auto", torch.float64, cpu, 16, 24) is expert_kernels.LOOP
    assert expert_kernels.choose("reference", torch.float32, cpu, 16, 24) is expert_kernels.REFERENCE


SAID = {
    "grouped GEMM": {},
    "a loop over experts": {"hidden": 22},
    "the reference's blocks of rows": {"backend": "reference"},
    "emulated_mxfp8": {"backend": "emulated_mxfp8", "dim": 32, "hidden": 32},
}


@pytest.mark.parametrize("name", SAID)
def test_what_multiplies_is_said_once(name, caplog):
    caplog.set_level("INFO", "torchtitan")
    _say.cache_clear()
    options = {"dim": 16, "hidden": 24} | SAID[name]
    experts = build(**options)
    for _ in range(2):
        experts(*inputs([32, 0, 32, 0], dim=options["dim"]))
    sizes = f"{options['hidden']} x {options['dim']}"
    assert caplog.messages == [f"experts of width {sizes} multiply in torch.float32 by {name}"]


IDS = torch.tensor([[2, 0], [0, 2], [2, 3], [1, 2], [2, 0], [2, 1]])  # of experts: (T, K)


@pytest.mark.parametrize("form", [{}, GPT_OSS], ids=["swiglu", "gpt_oss"])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_spread_and_their_rows_summed(device, kernels, form):
    """The same as rows that were gathered before, and summed after."""
    backend, dtype, dim, hidden = kernels
    experts = build(dtype, dim, hidden, backend=backend, **form).to(device)
    x, _, _ = inputs([len(IDS)], dtype, dim)
    _, counts, scores = inputs(IDS.flatten().bincount().tolist(), dtype, dim)
    scores = scores.view(IDS.shape)
    x, counts, scores = (tensor.detach().to(device) for tensor in (x, counts, scores))
    leaves = [x.requires_grad_(), scores.requires_grad_(), *experts.parameters()]
    order = routing.sort_by_expert(IDS.to(device))
    upstream = torch.randn_like(x)
    summed = gradients(experts(x, counts, scores, order), leaves, upstream)
    rows = experts(routing.spread(x, order), counts, routing.reorder(scores, order))
    expected = gradients(routing.collect(rows, order), leaves, upstream)
    assert_close(summed, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("max_rows", [1, 4, 16, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_nothing(dtype, max_rows, summed):
    order = routing.sort_by_expert(IDS) if summed else None
    x, counts, scores = inputs([3, 2, 6, 1], dtype, unused=0 if summed else 4)
    if summed:
        x, _, _ = inputs([len(IDS)], dtype)
        scores = scores.detach().view(IDS.shape).requires_grad_()
    upstream = torch.randn(x.shape, dtype=dtype)

    def with_chunks_of(size):
        experts = build(dtype, max_rows_per_chunk=size, **GPT_OSS)
        out = experts(x, counts, scores, order)
        return gradients(out, [x, scores, *experts.parameters()], upstream)

    assert_close(with_chunks_of(max_rows), with_chunks_of(0), TOLERANCE[dtype] / 10)


class Shapes(TorchDispatchMode):
    """Collects the shapes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.seen |= {tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)}
        return out


def test_chunks_bound_the_rows_of_intermediates():
    experts = build()
    rows, counts, scores = (tensor.detach() for tensor in inputs([30, 0, 9, 1]))
    weights = (experts.w13.detach(), experts.w2.detach(), None, None)
    options = Gating(), "auto", 8
    with Shapes() as shapes:
        operands = rows, *weights, counts, scores, None, len(rows)
        _, z = grouped_experts._init_fn(*operands, *options)
        grouped_experts_backward._init_fn(rows, z, *operands, *options)
    heights = {shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] in (24, 48)}
    assert max(heights) == 8


@pytest.fixture(params=[1, 16])
def num_threads(request):
    """Many threads share out even small products, and each number's place then matters."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dim, hidden", [(32, 64), (10, 7), (256, 1000), (64, 2100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_the_reference_has_the_same_bits_in_any_company(dtype, dim, hidden, num_threads):
    experts = build(dtype, dim, hidden, num_experts=2, backend="reference")
    rows, counts, scores = inputs([40, 3], dtype, dim)
    d_y = torch.randn_like(rows)

    def outputs(part, counts):
        leaves = [rows[part].detach().requires_grad_(), scores[part].detach().requires_grad_()]
        out = experts(leaves[0], counts, leaves[1])
        return out, *torch.autograd.grad(out, leaves, d_y[part])

    together = outputs(slice(0, 43), counts)
    for start, stop in [(0, 1), (0, 16), (0, 17), (3, 40), (15, 31), (39, 40)]:
        alone = outputs(slice(start, stop), torch.tensor([stop - start, 0]))
        for mine, theirs in zip(alone, together, strict=True):
            assert torch.equal(mine, theirs[start:stop])


def test_a_zero_row_changes_no_bit_of_the_references_weight_gradients():
    experts = build(backend="reference")
    rows, _, scores = inputs([20])
    rows, scores = rows.detach(), scores.detach()
    at = torch.tensor([0, 5, 6, 20])  # where rows of zeros are put among the others

    def gradients(rows, scores):
        out = experts(rows, torch.tensor([0, len(rows), 0, 0]), scores)
        return torch.autograd.grad(out.square().sum(), [experts.w13, experts.w2])

    padded_rows, padded_scores = rows, scores
    for i in at.flip(0).tolist():
        padded_rows = torch.cat([padded_rows[:i], torch.zeros(1, 16), padded_rows[i:]])
        padded_scores = torch.cat([padded_scores[:i], torch.zeros(1), padded_scores[i:]])
    for plain, padded in zip(gradients(rows, scores), gradients(padded_rows, padded_scores)):
        assert torch.equal(plain, padded)


@pytest.mark.parametrize("max_rows", [0, 3])
def test_grouped_mm_never_waits_for_the_device(max_rows, monkeypatch):
    experts = build(max_rows_per_chunk=max_rows)
    rows, counts, scores = inputs([3, 0, 5, 1], unused=2)

    def refuse(*args):
        raise AssertionError("a value was read on the host")

    for reader in ["tolist", "item", "cpu", "__bool__", "__int__", "__index__", "__float__"]:
        monkeypatch.setattr(torch.Tensor, reader, refuse)
    out = experts(rows, counts, scores)
    torch.autograd.backward(out, torch.ones_like(out))


@pytest.mark.parametrize("max_rows, z", [(0, 9 * 48 * 4), (4, 0)])
def test_backward_keeps_rows_and_preactivation_only(max_rows, z):
    experts = build(max_rows_per_chunk=max_rows)
    rows, counts, scores = inputs([3, 0, 5, 1])
    weights = (experts.w13, experts.w2)
    small = scores.nbytes + counts.nbytes + z
    saved = saved_bytes(lambda: experts(rows, counts, scores), *weights)
    assert saved == rows.nbytes + small
    order = routing.sort_by_expert(torch.tensor([[0, 2, 3], [2, 0, 2], [0, 2, 2]]))
    x = rows[:3].detach().clone()
    saved = saved_bytes(lambda: experts(x, counts, scores.view(3, 3), order), *weights)
    assert saved == x.nbytes + order.rows.nbytes + small


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("max_rows", [0, 4])
@pytest.mark.parametrize("summed", [True, False])
def test_the_operator_is_well_formed(summed, max_rows, weighted, bias):
    experts = build(bias=bias)
    weights = (experts.w13, experts.w2, experts.b13, experts.b2)
    x, counts, scores = inputs([3, 2, 6, 1])
    order = routing.sort_by_expert(IDS)
    rows, num_rows = order.rows if summed else None, len(x)
    if summed:
        x, scores = x[: len(IDS)].detach().requires_grad_(), scores.detach().view(IDS.shape).requires_grad_()
    arguments = (x, *weights, counts, scores if weighted else None, rows, num_rows)
    torch.library.opcheck(grouped_experts, (*arguments, [1.702, 7.0, 1.0], "auto", max_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compile_takes_any_dtype_whole(dtype):
    experts = build(dtype, **GPT_OSS)
    rows, counts, scores = inputs([3, 0, 5, 1], dtype)
    upstream = torch.randn(rows.shape, dtype=dtype)
    forward = lambda rows, scores: experts(rows * 2, counts, scores.sin())
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
    leaves = [rows, scores, *experts.parameters()]
    eager = gradients(forward(rows, scores), leaves, upstream)
    for mine, theirs in zip(gradients(compiled(rows, scores), leaves, upstream), eager):
        assert torch.equal(mine, theirs)


def test_operations_are_counted():
    experts = build()
    rows, counts, scores = inputs([3, 0, 5, 1])
    with FlopCounterMode(display=False) as counter:
        experts(rows, counts, scores).sum().backward()
    assert counter.get_total_flops() == 3 * 6 * 9 * 16 * 24
