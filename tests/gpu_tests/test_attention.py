"""Flex and SDPA on a GPU compute what CPUs do by dense masks: sinks, windows, chunks, documents."""

from dataclasses import replace

import pytest
import torch

from tests.unit_tests.models.helpers import build
from tests.unit_tests.models.test_attention import by_definition
from torchtitan.models import gpt_oss, llama4, olmo2
from torchtitan.models.attention import attend
from torchtitan.models.attention_mask import Documents, Pattern

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
LENGTH, HEADS, GROUPS, CHANNELS = 320, 8, 4, 64
DOCUMENTS = [[200, 120], [320]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(window=50), Pattern(chunk=70)], ids=str)
@pytest.mark.parametrize("attn_type", ["flex", "sdpa", "causal"])
def test_sinks(attn_type, pattern, dtype):
    generator = torch.Generator(GPU).manual_seed(0)
    shapes = [(2, LENGTH, HEADS, CHANNELS)] + 2 * [(2, LENGTH, GROUPS, CHANNELS)] + [(HEADS,)]
    tensors = [
        torch.randn(s, generator=generator, device=GPU).to(dtype).requires_grad_() for s in shapes
    ]
    dense = Documents.build(DOCUMENTS, [pattern], "sdpa", GPU).masks[pattern]
    mask = Documents.build(DOCUMENTS, [pattern], attn_type, GPU).masks[pattern]
    if attn_type == "causal":
        mask, dense = None, torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=GPU).tril()
    q, k, v, sinks = tensors
    out = attend(q, k, v, mask, None, sinks)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = by_definition(*exact[:3], dense, CHANNELS**-0.5, exact[3])
    upstream = torch.randn(out.shape, generator=generator, device=GPU)
    grads = torch.autograd.grad(out, tensors, upstream.to(out.dtype))
    wanted = torch.autograd.grad(expected, exact, upstream.to(out.dtype).double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip((out, *grads), (expected, *wanted), strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


FAMILIES = {
    "gpt_oss": replace(gpt_oss.FLAVORS["20b"].shrunk(2), head_dim=16, sliding_window=50),
    "llama4": replace(
        llama4.FLAVORS["17bx16e_irope"].shrunk(2), head_dim=16, attention_chunk=70, floor_scale=40
    ),
    "olmo2": replace(olmo2.FLAVORS["32B"].shrunk(2), dim=128),
}


def gradients(config, device):
    model = build(config).to(device)
    model.rope = model.rope.to(device)
    tokens = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    documents = model.documents(DOCUMENTS, device)
    loss = model(tokens, tokens.roll(-1, 1), documents)
    loss.backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attn_type", ["flex", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family, attn_type):
    config = replace(FAMILIES[family], attn_type=attn_type, attn_mask_type="block_causal")
    config = replace(config, seq_len=LENGTH, vocab_size=256)
    expected = gradients(config, torch.device("cpu"))
    found = gradients(config, GPU)
    errors = {name: ((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()}
    print(family, attn_type, max(errors.values()))
    assert all(error < 1e-4 for error in errors.values()), errors
