"""Models of transformers become ours, and again theirs; what does not fit is refused by name."""

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.unit_tests.checkpoint.hf_models import MODELS, reference
from tests.unit_tests.models.helpers import relative_error
from torchtitan.checkpoint.hf import load_pretrained
from torchtitan.checkpoint.hf_export import save_pretrained

ASSETS = "tests/assets/tokenizer"


def save_theirs(folder, name, **changes):
    theirs = reference(name, **changes)
    theirs.save_pretrained(folder)
    return theirs


def contents(folder):
    """Names, shapes and dtypes in a folder's files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            found |= {n: (tuple(p.get_shape()), p.get_dtype()) for n, p in parts.items()}
    return found


@pytest.mark.parametrize("name", MODELS)
def test_models_go_in_and_out(name, tmp_path):
    theirs = save_theirs(tmp_path / "theirs", name)
    ours = load_pretrained(tmp_path / "theirs")
    tokens = torch.randint(54, (2, 17), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    logits = theirs(inputs).logits
    assert relative_error(ours(inputs), logits) < 1e-5

    save_pretrained(ours, tmp_path / "ours", assets=ASSETS)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_equal(again.state_dict(), theirs.state_dict())
    assert torch.equal(again(inputs).logits, logits)

    # Gradients take the weights' way to theirs: as a folder of their own.
    ours(inputs, labels).backward()
    cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    save_pretrained(ours, tmp_path / "gradients", assets=ASSETS)
    gradients = dict(
        AutoModelForCausalLM.from_pretrained(tmp_path / "gradients").named_parameters()
    )
    errors = {n: relative_error(gradients[n], p.grad) for n, p in theirs.named_parameters()}
    assert {n: error for n, error in errors.items() if not error < 1e-5} == {}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
