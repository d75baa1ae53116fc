"""A run that cannot work is refused before any rank starts: one message each, status 2, no traceback."""

import json
import shutil
from pathlib import Path

import pytest

from torchtitan.checkpoint import storage
from torchtitan.config.bounds import is_positive_count
from torchtitan.config.names import leaf_keys
from torchtitan.config.schema import JobConfig
from torchtitan.preflight import main

TOKENIZER = Path(__file__).parents[1] / "assets" / "tokenizer"
DEBUG = ["--model.flavor=debugmodel"]
EMULATED = ["--model.converters=float8", "--quantize.linear.float8.emulate"]


def broken_tokenizer(folder):
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").write_text("{ not json")
    return [f"--model.hf_assets_path={folder / 'tokenizer'}"]


def empty_dataset(folder):
    (folder / "empty.jsonl").write_text("")
    return [f"--training.dataset={folder / 'empty.jsonl'}"]


def useless_dataset(folder):
    (folder / "bad.jsonl").write_text(json.dumps({"words": "no text key"}) + "\n")
    return [f"--training.dataset={folder / 'bad.jsonl'}"]


CASES = {
    "misspelt key": (["--training.sqe_len=8"], "training.seq_len"),
    "wrong type": (["--training.steps=many"], "expects an integer"),
    "impossible combination": (["--training.global_batch_size=3"], "global_batch_size"),
    "too long": (["--training.seq_len=200000"], "limit of 131072 positions"),
    "missing file": (["--job.config_file=/no/such.toml"], "/no/such.toml"),
    "corrupt tokenizer": (broken_tokenizer, "hf_assets_path"),
    "empty dataset": (empty_dataset, "training.dataset"),
    "dataset without text": (useless_dataset, "training.dataset"),
    "missing dataset": (["--training.dataset=c4_tset"], 'Did you mean "c4_test"?'),
    "vocabulary mismatch": (["--model.overrides.vocab_size=100"], "vocab_size"),
    "unknown flavor": (["--model.flavor=9B"], "8B"),
    "flavor in another case": (["--model.flavor=8b"], 'Did you mean "8B"?'),
    "unknown override": (["--model.overrides.n_layer=2"], "n_layers"),
    "override of what a key sets": (
        ["--model.overrides.seq_len=64"],
        "model.overrides.seq_len = 64 (command line): training.seq_len sets it in every run. Write training.seq_len.",
    ),
    "override of what a key sets for experts": (
        ["--model.name=llama4", "--model.overrides.moe.router_z_coeff=0.1"],
        "model.overrides.moe.router_z_coeff = 0.1 (command line): moe.router_z_coeff sets it",
    ),
    "ranks that do not divide": (
        ["--parallelism.data_parallel_replicate_degree=3"],
        "does not divide the 4 ranks",
    ),
    "ranks of a stage that do not divide": (
        ["--parallelism.pipeline_parallel_degree=2", "--parallelism.data_parallel_replicate_degree=4"],
        "does not divide the 2 that other degrees leave of 4. Use 1 or 2",
    ),
    "heads that do not divide": (
        ["--parallelism.tensor_parallel_degree=4", "--model.overrides.n_heads=2", "--model.overrides.n_kv_heads=2"],
        "does not divide 2 (heads)",
    ),
    "not built": (["--fault_tolerance.enable"], "not built"),
    "pattern of nothing": (["--optimizer.no_decay=*nrom*"], "matches no parameter"),
    "missing import": (["--experimental.custom_import=no_such_module"], "custom_import"),
    "import that fails": (
        ["--experimental.custom_import=tests.unit_tests.quantization.broken_converter"],
        "broken_converter.py:3).",
    ),
    "unknown compiler": (["--compile.enable", "--compile.backend=indcutor"], 'Did you mean "inductor"?'),
    "no place to write": (["--job.dump_folder=/dev/null/run"], "cannot write to /dev/null"),
    "missing step": (["--checkpoint.enable", "--checkpoint.load_step=7"], "no such checkpoint"),
    "missing checkpoint": (
        ["--checkpoint.enable", "--checkpoint.initial_load_path=/no/where"],
        "no such folder",
    ),
    "weights of transformers in no folder": (
        ["--checkpoint.enable", "--checkpoint.initial_load_in_hf"],
        "checkpoint.initial_load_in_hf = true (command line): tests/assets/tokenizer has no config.json",
    ),
    "seed of several ranks": (
        ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"],
        "is written by one process, and there are 4 ranks. Set NGPU=1.",
    ),
    "pinned memory without a GPU": (
        ["--checkpoint.enable", "--checkpoint.async_mode=async_with_pinned_mem"],
        "pinned memory speeds up copies from a GPU, and there is none.",
    ),
    "budget without checkpoints": (
        ["--checkpoint.max_run_seconds=60"],
        "would end the run with nothing saved",
    ),
    "float8 without a GPU": (["--model.converters=float8"], "float8 products need a GPU"),
    "MX without a GPU": (["--model.converters=quantize.linear.mx"], 'Use "mxfp8_emulated_rceil"'),
    "unknown converter": (["--model.converters=flaot8"], 'Did you mean "float8"?'),
    "filter of everything": (
        [*EMULATED, "--quantize.linear.float8.filter_fqns=layers,output"],
        "none of the model's Linear layers to convert",
    ),
    "blocks that are split": (
        [
            "--model.converters=quantize.linear.mx",
            "--quantize.linear.mx.recipe_name=mxfp8_emulated_rceil",
            "--parallelism.tensor_parallel_degree=4",
            "--model.overrides.n_kv_heads=4",
        ],
        "splits layers.*.attention.wk to 16 x 256, layers.*.attention.wv to 16 x 256, and "
        "quantize.linear.mx needs multiples of 32.",
    ),
    "part that is not there": (
        ["--checkpoint.exclude_from_loading=optimiser"],
        'Did you mean "optimizer"?',
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_refused_with_one_message(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NGPU", "4")
    arguments, expected = CASES[name]
    argv = arguments(tmp_path) if callable(arguments) else arguments
    assert main([*DEBUG, f"--job.dump_folder={tmp_path}", *argv]) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("- ")]) == 1, printed


COUNTS = [key for key in leaf_keys(JobConfig()) if is_positive_count(key)]


@pytest.mark.parametrize("value", ["0", "-7"])
@pytest.mark.parametrize("key", COUNTS)
def test_a_count_below_one_is_a_mistake(key, value, tmp_path, capsys):
    stages = ["--parallelism.pipeline_parallel_degree=2"] if "per_stage" in key else []
    assert main([*DEBUG, f"--job.dump_folder={tmp_path}", *stages, f"--{key}={value}"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert key in [line.split()[1] for line in printed if line.startswith("- ")]


RESUMED = {
    "another seed": (["--debug.seed=2"], "debug.seed = 2 (command line): the checkpoint's data position"),
    "another batch": (["--training.global_batch_size=16"], "belongs to batches of 8 sequences"),
    "more sources": (
        ["--training.dataset=[{name = 'c4_test'}, {name = 'c4_test_validation'}]"],
        "names 2 sources, the checkpoint was made with 1",
    ),
    "weights alone": (["--training.steps=4"], "holds only the weights"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_that_would_read_other_data_is_refused(name, tmp_path, capsys):
    arguments, expected = RESUMED[name]
    place = {"turn": 1, "sources": [{"epoch": 0, "document": 0, "offset": 9, "skipped": 0}]}
    progress = {
        "step": 2,
        "n_tokens_seen": 100,
        "seed": 1,
        "model_only": name == "weights alone",
        "global_batch_size": 8,
        "slots": {str(slot): place for slot in range(8)},
    }
    temporary = storage.temporary_path(tmp_path / "checkpoint", 2)
    storage.new_folder(temporary)
    storage.publish(temporary, {"progress": progress, "origin": {}, "files": {}})
    argv = [*DEBUG, f"--job.dump_folder={tmp_path}", "--checkpoint.enable"]
    if name != "weights alone":
        assert main(argv) == 0
        assert main([*argv, "--debug.seed=1"]) == 0
    assert main([*argv, *arguments]) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert len([line for line in printed.splitlines() if line.startswith("- ")]) == 1, printed


def test_all_mistakes_are_listed_at_once(tmp_path, capsys):
    argv = ["--training.seq_len=200000", "--optimizer.beta1=2", "--training.dataset=nothing"]
    assert main([*DEBUG, f"--job.dump_folder={tmp_path}", *argv]) == 2
    printed = capsys.readouterr().err
    assert all(key in printed for key in ("seq_len", "beta1", "training.dataset"))


def test_a_config_that_works_is_passed_in_silence(tmp_path, capsys):
    assert main([*DEBUG, f"--job.dump_folder={tmp_path}"]) == 0
    assert capsys.readouterr().err == ""
