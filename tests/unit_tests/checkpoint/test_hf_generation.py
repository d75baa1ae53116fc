"""What a run saves in Hugging Face's format goes on with the same words there, each family's."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit_tests.checkpoint.hf_models import MODELS, reference
from tests.unit_tests.checkpoint.test_hf import ASSETS
from torchtitan.checkpoint.hf import load_pretrained
from torchtitan.checkpoint.hf_export import save_pretrained

NUM_NEW = 8


@pytest.mark.parametrize("name", [name for name in MODELS if "," not in name])
@torch.no_grad()
def test_greedy_words_are_the_same_there_and_here(name, tmp_path):
    """There with a cache of keys and values, here from all tokens anew."""
    reference(name).save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs").eval()
    save_pretrained(ours, tmp_path / "ours", assets=ASSETS)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    prompts = torch.randint(54, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}
    expected = saved.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    tokens = prompts
    for _ in range(NUM_NEW):
        tokens = torch.cat([tokens, ours(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, expected)
