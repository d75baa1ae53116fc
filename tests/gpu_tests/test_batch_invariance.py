"""On a GPU too a row's bits depend on no other row: products, experts, and every family's logits."""

from dataclasses import replace

import pytest
import torch

from tests.unit_tests.models import test_batch_invariance as on_cpu
from tests.unit_tests.models.helpers import build
from tests.unit_tests.models.test_packed_documents import FLAVORS
from torchtitan.models.moe.experts import GroupedExperts
from torchtitan.ops.batch_invariance import BatchInvariance
from torchtitan.ops.row_products import grouped_product, product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
WIDTHS = [(32, 64), (10, 7), (256, 1000), (2048, 768)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
PARTS = [(0, 1), (0, 16), (3, 40), (100, 229), (299, 300), (1, 300)]


def random(*shape, dtype, seed=0):
    generator = torch.Generator(GPU).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=GPU).to(dtype)


@DTYPES
@pytest.mark.parametrize(("width", "out_width"), WIDTHS)
def test_a_row_of_a_product_has_the_same_bits_in_any_company(width, out_width, dtype):
    a, weight = random(300, width, dtype=dtype), random(out_width, width, dtype=dtype, seed=1)
    whole = product(a, weight.t())
    exact = a.double() @ weight.t().double()
    assert (whole.double() - exact).norm() < TOLERANCE[dtype] * exact.norm()
    for start, stop in PARTS:
        assert torch.equal(product(a[start:stop], weight.t()), whole[start:stop])


@DTYPES
@pytest.mark.parametrize("counts", [[40, 3], [0, 0, 300], [1, 0, 129, 64, 0, 5], [0]], ids=str)
def test_grouped_products_are_right(counts, dtype):
    """Also with rows of no group at the end, and matrices that are transposed views."""
    weights = random(len(counts), 72, 100, dtype=dtype).mT
    a = random(sum(counts) + 5, 100, dtype=dtype, seed=1)
    out = grouped_product(a, weights, torch.tensor(counts, device=GPU))
    for part, weight, found in zip(a.split([*counts, 5]), weights, out.split([*counts, 5])):
        exact = part.double() @ weight.double()
        assert (found.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@DTYPES
@pytest.mark.parametrize(("dim", "hidden"), WIDTHS)
def test_a_row_of_the_reference_experts_has_the_same_bits_in_any_company(dim, hidden, dtype):
    """Outputs, and the gradients of rows and scores."""
    with GPU:
        experts = GroupedExperts(dim, hidden, 2, residual_std=0.02, backend="reference").to(dtype)
    for index, weight in enumerate(experts.parameters()):
        weight.data = random(*weight.shape, dtype=dtype, seed=index) / dim**0.5
    rows, d_y = (random(303, dim, dtype=dtype, seed=seed) for seed in (3, 4))
    scores = random(303, dtype=torch.float32, seed=5).sigmoid()

    def outputs(part, counts):
        leaves = [rows[part].clone().requires_grad_(), scores[part].clone().requires_grad_()]
        out = experts(leaves[0], torch.tensor(counts, device=GPU), leaves[1])
        return out, *torch.autograd.grad(out, leaves, d_y[part])

    together = outputs(slice(0, 303), [300, 3])
    for start, stop in PARTS:
        alone = outputs(slice(start, stop), [stop - start, 0])
        for mine, theirs in zip(alone, together, strict=True):
            assert torch.equal(mine, theirs[start:stop])


@DTYPES
@pytest.mark.parametrize("family", FLAVORS)
def test_a_documents_logits_have_the_same_bits_in_any_batch(family, dtype):
    for mask_type, rows in (("causal", [[45]] * 5), ("block_causal", on_cpu.ROWS)):
        model, tokens = on_cpu.invariant(family, dtype, attn_mask_type=mask_type)
        model.to(GPU)
        tokens = tokens.to(GPU)
        with torch.no_grad(), BatchInvariance():
            five = model(tokens, documents=model.documents(rows, GPU))
            pair = model(tokens[[3, 0]], documents=model.documents([rows[3], rows[0]], GPU))
            assert torch.equal(pair, five[[3, 0]])
            for row, lengths in enumerate(rows):
                for piece, expected in zip(tokens[row].split(lengths), five[row].split(lengths)):
                    documents = model.documents([[len(piece)]], GPU)
                    assert torch.equal(model(piece[None], documents=documents)[0], expected)


def test_long_sequences_of_wide_layers_too():
    """Where libraries split sums over keys, or over the depth of a product, if they are left to choose."""
    config = replace(
        FLAVORS["llama3"], n_layers=1, dim=2048, n_heads=16, n_kv_heads=4, ffn_dim=4096, seq_len=2048
    )
    model = build(replace(config, batch_invariant=True)).to(GPU, torch.bfloat16)
    model.rope = model.rope.to(GPU, torch.float32)
    tokens = torch.randint(2048, (4, 2048), device=GPU)
    with torch.no_grad(), BatchInvariance():
        four = model(tokens)
        for row in range(4):
            assert torch.equal(model(tokens[row : row + 1])[0], four[row])
