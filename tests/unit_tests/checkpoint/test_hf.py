"""Models of transformers become ours, and again theirs; what does not fit is refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.unit_tests.checkpoint.hf_models import MODELS, reference
from tests.unit_tests.models.helpers import relative_error
from torchtitan.checkpoint import hf_export
from torchtitan.checkpoint.hf import load_pretrained, open_folder
from torchtitan.checkpoint.hf_export import save_pretrained
from torchtitan.checkpoint.hf_pieces import mismatches
from torchtitan.config.faults import ConfigError

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


def rewrite(folder, change):
    """Change the tensors of a folder's one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, **options):
    with pytest.raises(ConfigError) as error:
        load_pretrained(folder, **options)
    return str(error.value).replace(str(folder), "FOLDER")


def test_of_many_tensors_the_first_are_named():
    [fault] = mismatches(Path("FOLDER"), {f"w{i:02}": (1,) for i in range(13)}, {})
    assert fault.reason == "lacks w00, w01, w02, w03, w04, w05, w06, w07, w08, w09 and 3 more."


def test_every_missing_extra_and_misshapen_tensor_is_named(tmp_path):
    save_theirs(tmp_path, "qwen3_moe")
    gate = "model.layers.0.mlp.experts.3.gate_proj.weight"

    def change(tensors):
        del tensors[gate], tensors["lm_head.weight"]
        tensors["model.layers.2.mlp.experts.0.gate_proj.weight"] = torch.zeros(24, 32)
        tensors["model.norm.bias"] = torch.zeros(32)
        tensors["model.norm.weight"] = torch.ones(31)

    rewrite(tmp_path, change)
    assert refused(tmp_path) == (
        f"- FOLDER: lacks lm_head.weight, {gate}.\n"
        "- FOLDER: the model has no place for model.layers.2.mlp.experts.0.gate_proj.weight, "
        "model.norm.bias.\n"
        "- FOLDER: of another shape than in the model: model.norm.weight [31] in place of [32]."
    )


def test_a_tensor_of_whole_numbers_is_refused(tmp_path):
    save_theirs(tmp_path, "llama3")
    rewrite(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}))
    assert refused(tmp_path) == "- FOLDER: model.norm.weight has dtype I32."


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: rope_type"),
        ({"attention_bias": True}, "attention_bias = true: only False is supported."),
        ({"sliding_window": 8}, "sliding_window = 8: is not supported."),
        ({"head_dim": 16}, "head_dim = 16: only 8 is supported here."),
        ({"model_type": "gemma9"}, 'model_type = "gemma9": no family has this architecture.'),
    ],
)
def test_a_field_that_matters_is_refused_by_name(tmp_path, change, expected):
    save_theirs(tmp_path, "llama3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert f"FOLDER/config.json: {expected}" in refused(tmp_path)


def test_broken_folders_are_refused(tmp_path):
    assert refused(tmp_path) == "- FOLDER/config.json: there is no such file."
    save_theirs(tmp_path, "llama3")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert re.match(r"- FOLDER/model.safetensors: cannot be read: .* Download", refused(tmp_path))
    weights.unlink()
    assert "FOLDER: has neither model.safetensors.index.json nor" in refused(tmp_path)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "FOLDER/model-00001-of-00001.safetensors: is named in" in refused(tmp_path)


def test_a_second_copy_of_a_tied_weight_must_be_the_same(tmp_path):
    save_theirs(tmp_path, "llama3, tied")
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    load_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t["lm_head.weight"][3].zero_())
    with pytest.raises(ValueError, match="model.embed_tokens.weight and lm_head.weight differ"):
        load_pretrained(tmp_path)


def test_layers_that_predict_later_tokens_are_left_out(tmp_path):
    save_theirs(tmp_path, "deepseek_v3")
    rewrite(tmp_path, lambda t: t.update({"model.layers.2.enorm.weight": torch.ones(32)}))
    load_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.1.enorm.weight": torch.ones(32)}))
    assert "no place for model.layers.1.enorm.weight" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_go_in_and_out(tmp_path, dtype):
    theirs = reference("deepseek_v3").to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")  # in fp32
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    save_pretrained(ours, tmp_path / "ours", dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == dtype
    # The balance bias is a buffer, and stays in fp32.
    assert_equal({n: t.to(dtype) for n, t in again.state_dict().items()}, theirs.state_dict())
    assert load_pretrained(tmp_path / "ours", dtype=dtype).tok_embeddings.weight.dtype == dtype


def test_large_models_are_in_several_files(tmp_path, monkeypatch):
    theirs = save_theirs(tmp_path / "theirs", "qwen3_moe")
    monkeypatch.setattr(hf_export, "MAX_FILE_BYTES", 20_000)
    ours = load_pretrained(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours")
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 5 and all(f.stat().st_size < 25_000 for f in files)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in theirs.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_equal(again.state_dict(), theirs.state_dict())
    assert_equal(load_pretrained(tmp_path / "ours").state_dict(), ours.state_dict())


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    save_theirs(tmp_path, "llama3")
    with pytest.raises(ConfigError, match="is there already"):
        save_pretrained(load_pretrained(tmp_path), tmp_path)


def test_what_no_file_can_hold_is_not_saved(tmp_path):
    save_theirs(tmp_path / "theirs", "deepseek_v2", num_hidden_layers=3)
    ours = load_pretrained(tmp_path / "theirs")
    biases = [b for name, b in ours.named_buffers() if name.endswith("expert_bias")]
    assert len(biases) > 1
    for bias in biases:
        bias[0] = 1.0
    more = f"and {len(biases) - 1} more are not"
    with pytest.raises(ConfigError, match=f"expert_bias: is not zero in .*, {more}: .* no balance bias") as error:
        save_pretrained(ours, tmp_path / "ours")
    assert len(error.value.faults) == 1
    assert not (tmp_path / "ours").exists()


def test_block_quantized_weights_are_dequantized(tmp_path):
    save_theirs(tmp_path, "deepseek_v3")
    whole = load_file(tmp_path / "model.safetensors")
    expected = {}

    def quantize(tensors):
        for name, weight in whole.items():
            if weight.dim() != 2 or "proj" not in name:
                continue
            scales = torch.rand(-(-weight.shape[0] // 16), -(-weight.shape[1] // 16))
            spread = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
            spread = spread[: weight.shape[0], : weight.shape[1]]
            tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
            expected[name] = tensors[name].float() * spread

    rewrite(tmp_path, quantize)
    path = tmp_path / "config.json"
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": quantization}))
    save_pretrained(load_pretrained(tmp_path), tmp_path / "ours")
    assert len(expected) > 10
    assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), whole | expected)

    name, ours = next(iter(expected)), load_pretrained(tmp_path).config
    with pytest.raises(ConfigError, match="initial_load_in_hf_quantized = false: the weights"):
        open_folder(tmp_path, ours, "deepseek_v3", quantized=False)
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    assert f"lacks {name}_scale_inv." in refused(tmp_path)
