"""Documents packed into one sequence know nothing of each other, in every family."""

from dataclasses import replace

import pytest
import torch

from tests.unit_tests.models.helpers import CPU, build
from torchtitan.models import deepseek_v3, gpt_oss, llama3, llama4, mixtral, olmo2, qwen3

FLAVORS = {
    "llama3": llama3.FLAVORS["debugmodel"],
    "llama3, flex": llama3.FLAVORS["debugmodel_flex_attn"],
    "llama3, varlen": llama3.FLAVORS["debugmodel_varlen_attn"],
    "qwen3": qwen3.FLAVORS["debugmodel_moe"],
    "deepseek_v3": deepseek_v3.FLAVORS["671B"],
    "mixtral": mixtral.FLAVORS["debugmodel"],
    "gpt_oss": gpt_oss.FLAVORS["debugmodel"],  # windows of 4
    "llama4": llama4.FLAVORS["debugmodel_irope"],  # chunks of 6, steps of temperature at 4
    "olmo2": olmo2.FLAVORS["debugmodel"],
}
LENGTHS = [[5, 1, 10], [16]]


@pytest.fixture(params=FLAVORS)
def model(request):
    """Its experts give a row the same bits however many rows there are."""
    config = FLAVORS[request.param].shrunk(2)
    moe = config.moe and replace(config.moe, experts_backend="reference")
    config = replace(config, moe=moe, attn_mask_type="block_causal", vocab_size=64, seq_len=16)
    return build(config)


def test_packed_documents_equal_documents_alone(model):
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    packed = model(tokens, documents=model.documents(LENGTHS, CPU))
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            piece = tokens[row : row + 1, start : start + length]
            alone = model(piece, documents=model.documents([[length]], CPU))
            torch.testing.assert_close(packed[row, start : start + length], alone[0])
            start += length


def test_another_documents_tokens_leave_the_bits_alone(model):
    documents = model.documents([[6, 10]], CPU)
    first, second = torch.randint(64, (2, 1, 16), generator=torch.Generator().manual_seed(0))
    second[:, 6:] = first[:, 6:]
    outputs = [model(tokens, documents=documents) for tokens in (first, second)]
    assert torch.equal(outputs[0][:, 6:], outputs[1][:, 6:])
    assert not torch.equal(outputs[0][:, :6], outputs[1][:, :6])
