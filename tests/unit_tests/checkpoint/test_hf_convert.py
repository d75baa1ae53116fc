"""Checkpoints of Hugging Face folders and back, as the scripts make them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit_tests.checkpoint.hf_models import reference
from tests.unit_tests.checkpoint.test_hf import ASSETS, assert_equal, contents
from torchtitan.checkpoint import hf_convert, hf_export
from torchtitan.checkpoint.hf import load_pretrained
from torchtitan.config.faults import ConfigError

SCRIPTS = Path("scripts/checkpoint_conversion")
LLAMA3 = """
    --model_name llama3 --model_flavor 8B
    --model.overrides.dim 32 --model.overrides.n_layers 2 --model.overrides.n_heads 4
    --model.overrides.n_kv_heads 2 --model.overrides.ffn_dim 48 --model.overrides.vocab_size 54
    --model.overrides.max_seq_len 64 --model.overrides.norm_eps 1e-6
    --model.overrides.rope_theta 10000.0 --model.overrides.rope_scaling.original_max_seq_len 16
""".split()


def script(name, *arguments):
    command = [sys.executable, SCRIPTS / f"{name}.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": "."}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_the_scripts_make_the_same_folder_again(tmp_path):
    theirs = reference("llama3, long").bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    made = script("convert_from_hf", tmp_path / "theirs", tmp_path / "step-0", *LLAMA3)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{tmp_path / 'step-0'}\n"
    assert "100%" in made.stderr
    back = ["--hf_assets_path", ASSETS, "--export_dtype", "bfloat16", *LLAMA3]
    made = script("convert_to_hf", tmp_path / "step-0", tmp_path / "ours", *back)
    assert made.returncode == 0, made.stderr
    assert "100%" in made.stderr
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_equal(again.state_dict(), theirs.state_dict())
    assert (tmp_path / "ours" / "tokenizer.json").exists()


def test_another_model_is_refused(tmp_path):
    reference("llama3").save_pretrained(tmp_path / "theirs")
    made = script("convert_from_hf", tmp_path / "theirs", tmp_path / "step-0", *LLAMA3)
    assert made.returncode == 2
    assert made.stderr.splitlines()[0] == (
        '- model.overrides.rope_scaling = "RoPEScaling(factor=8.0, low_freq_factor=1.0, '
        f'high_freq_factor=4.0, original_max_seq_len=16)": {tmp_path}/theirs/config.json says None.'
    )
    assert not (tmp_path / "step-0").exists()


@pytest.mark.parametrize(
    ("name", "family"), [("qwen3_moe", "qwen3"), ("deepseek_v2, groups", "deepseek_v3")]
)
def test_pieces_larger_than_a_chunk_are_read_in_parts(name, family, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_convert, "MAX_CHUNK_BYTES", 5000)
    monkeypatch.setattr(hf_export, "MAX_FILE_BYTES", 20_000)
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    config = load_pretrained(tmp_path / "theirs").config
    step = tmp_path / "step-0"
    hf_convert.from_hf(tmp_path / "theirs", step, config, family, None)
    assert max(file.stat().st_size for file in step.glob("*.distcp")) < 9000  # an expert has 6144
    hf_convert.to_hf(step, tmp_path / "ours", config, family, torch.float16, None)
    assert load_pretrained(tmp_path / "ours").config == config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    expected = {name: tensor.half().float() for name, tensor in theirs.state_dict().items()}
    assert_equal(again.state_dict(), expected)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    reference("llama3").save_pretrained(tmp_path / "small")
    reference("llama3", num_hidden_layers=3, intermediate_size=40).save_pretrained(tmp_path / "big")
    small, big = (load_pretrained(tmp_path / name).config for name in ("small", "big"))
    hf_convert.from_hf(tmp_path / "small", tmp_path / "step-0", small, "llama3", None)
    with pytest.raises(ConfigError) as error:
        hf_convert.to_hf(tmp_path / "step-0", tmp_path / "ours", big, "llama3", None, None)
    lacks, misshapen = (fault.reason for fault in error.value.faults)
    assert lacks.startswith("lacks layers.2.attention.wk.weight, ")
    assert "layers.0.feed_forward.w1.weight [48, 32] in place of [40, 32]" in misshapen
    with pytest.raises(ConfigError, match="is no checkpoint"):
        hf_convert.to_hf(tmp_path / "small", tmp_path / "ours", small, "llama3", None, None)


def test_statistics_of_training_are_left_out(tmp_path):
    theirs = reference("qwen3_moe")
    theirs.save_pretrained(tmp_path / "theirs")
    config = load_pretrained(tmp_path / "theirs").config
    trained = replace(config, moe=replace(config.moe, global_balance_coeff=0.1))
    hf_convert.from_hf(tmp_path / "theirs", tmp_path / "step-0", trained, "qwen3", None)
    for name, run in (("a", config), ("b", trained)):
        hf_convert.to_hf(tmp_path / "step-0", tmp_path / name, run, "qwen3", None, None)
        assert contents(tmp_path / name) == contents(tmp_path / "theirs")
