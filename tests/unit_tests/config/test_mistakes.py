"""Each mistake a user makes in a file or on the command line gets one fault that helps."""

from pathlib import Path

import pytest

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.manager import load_config
from torchtitan.config.names import RENAMED, REPLACED, leaf_keys, section_names, suggest
from torchtitan.config.schema import JobConfig

KEYS = list(leaf_keys(JobConfig))


def the_fault(argv: list[str]) -> Fault:
    with pytest.raises(ConfigError) as error:
        load_config(argv)
    (fault,) = error.value.faults
    return fault


def fault_in(folder: Path, text: str) -> Fault:
    (folder / "run.toml").write_text(text)
    return the_fault(["--job.config_file", str(folder / "run.toml")])


def misspell(key: str) -> str:
    """The key with two letters in the middle of its name swapped."""
    section, _, name = key.rpartition(".")
    middle = next(i for i in range(len(name) // 2, 0, -1) if name[i - 1] != name[i])
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    return f"{section}.{swapped}"


LONG_ENOUGH = [key for key in KEYS if len(key.rpartition(".")[2]) >= 4]


@pytest.mark.parametrize("key", LONG_ENOUGH)
def test_a_misspelt_key_is_answered_with_the_right_one(key):
    assert suggest(misspell(key), KEYS) == f"Did you mean {key}?"


def test_a_misspelt_key_in_a_file_is_found_with_its_line(tmp_path):
    fault = fault_in(tmp_path, "[metrics]\nlog_freq = 1\n\n[training]\nsteps = 1\nseq_lne = 4")
    assert str(fault) == (
        f"training.seq_lne ({tmp_path}/run.toml:6): no such key. Did you mean training.seq_len?"
    )


def test_a_misspelt_option_is_found():
    fault = the_fault(["--training.seq-lne", "4"])
    assert str(fault) == (
        "--training.seq-lne (command line): no such option. Did you mean training.seq_len?"
    )


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("trainin.steps", "Did you mean training.steps?"),
        ("training.data_loader.num_workers", "Did you mean training.dataloader.num_workers?"),
        (
            "quantize.linear.fp8.emulate",
            "It exists as quantize.linear.float8.emulate and quantize.grouped_mm.float8.emulate.",
        ),
        ("training.warmup_steps", "It exists as lr_scheduler.warmup_steps."),
        ("model.seq_len", "It exists as training.seq_len and validation.seq_len."),
        ("steps", "It exists as training.steps and validation.steps."),
        ("model.qwertyuiop", ""),
    ],
)
def test_misplaced_keys_and_misspelt_sections(key, advice):
    assert suggest(key, KEYS) == advice


OLD_KEYS = [
    ("checkpoint.enable_checkpoint", "checkpoint.enable"),
    ("checkpoint.interval_type", "checkpoint.interval"),
    ("checkpoint.model_weights_only", "checkpoint.last_save_model_only"),
    ("checkpoint.last_save_model_weights_only", "checkpoint.last_save_model_only"),
    ("job.print_args", "job.print_config"),
    ("lr_scheduler.lr_min", "lr_scheduler.min_lr_factor"),
    ("metrics.enable_color_printing", "metrics.disable_color_printing"),
    ("model.use_flex_attn", "model.flavor"),
    ("model.attn_mask_type", "model.flavor"),
    ("profiling.run_profiler", "profiling.enable_profiling"),
    ("profiling.profile_every_x_iter", "profiling.profile_freq"),
    ("training.batch_size", "training.local_batch_size"),
    ("training.compile", "compile.enable"),
    ("training.seed", "debug.seed"),
    ("training.warmup_steps", "lr_scheduler.warmup_steps"),
    ("training.warmup_pct", "lr_scheduler.warmup_steps"),
    ("training.data_parallel_degree", "parallelism.data_parallel_shard_degree"),
    ("training.data_parallel_replicate_degree", "parallelism.data_parallel_replicate_degree"),
    ("training.data_parallel_shard_degree", "parallelism.data_parallel_shard_degree"),
    ("training.tensor_parallel_degree", "parallelism.tensor_parallel_degree"),
    ("training.sequence_parallel_degree", "parallelism.tensor_parallel_degree"),
    ("training.pipeline_parallel_degree", "parallelism.pipeline_parallel_degree"),
    ("training.fsdp_reshard_after_forward", "parallelism.fsdp_reshard_after_forward"),
    ("training.enable_float8_linear", "quantize.linear.float8"),
    ("training.fp8_linear", "quantize.linear.float8"),
    ("training.checkpoint_folder", "checkpoint.folder"),
    ("training.checkpoint_interval", "checkpoint.interval"),
    ("experimental.context_parallel_degree", "parallelism.context_parallel_degree"),
    ("experimental.pipeline_parallel_degree", "parallelism.pipeline_parallel_degree"),
    ("experimental.enable_async_tensor_parallel", "parallelism.enable_async_tensor_parallel"),
    ("float8.enable_float8_linear", "quantize.linear.float8"),
    ("float8.filter_fqns", "quantize.linear.float8.filter_fqns"),
    ("mx.filter_fqns", "quantize.linear.mx.filter_fqns"),
    ("quantize.dense.float8.emulate", "quantize.linear.float8.emulate"),
    ("quantize.moe.mx.fqns", "quantize.grouped_mm.mx.fqns"),
    ("validation.enabled", "validation.enable"),
    ("eval.freq", "validation.freq"),
    ("encoder.auto_encoder_path", "encoder.autoencoder_path"),
    ("global.dump_folder", "job.dump_folder"),
    # keys without a successor: that is what is said
    ("job.use_for_integration_test", "no such key any more"),
    ("model.norm_type", "norm"),
    ("training.guidance", "Flux"),
    ("experimental.torch_spmd", "no such mode any more"),
]


@pytest.mark.parametrize(("old", "new"), OLD_KEYS, ids=[old for old, _ in OLD_KEYS])
def test_keys_of_older_releases_are_answered_with_the_new_ones(old, new, tmp_path):
    section, _, name = old.rpartition(".")
    fault = fault_in(tmp_path, f"[{section}]\n{name} = 1")
    assert fault.setting == old
    assert fault.source.endswith(":2")
    assert new in fault.remedy


def test_new_names_of_old_keys_exist_and_old_ones_do_not():
    places = {*KEYS, *section_names(KEYS)}
    assert {new.removesuffix(".*") for new in RENAMED.values()} <= places
    assert not places & {*RENAMED, *REPLACED}


@pytest.mark.parametrize(
    ("line", "expects"),
    [
        ('[training]\nsteps = "8"', "expects an integer. Write it without quotes: 8."),
        ("[training]\nsteps = 8.5", "expects an integer."),
        ("[training]\nsteps = true", "expects an integer."),
        ('[training]\ndtype = "float16"', 'expects one of "bfloat16", "float32".'),
        ("[training]\ndataset = 3", "expects a string or a table or a list of tables."),
        ("[training]\ndataset = [1]", "expects a string or a table or a list of tables."),
        ("[optimizer]\nlr = true", "expects a number."),
        ('[compile]\nenable = "true"', "expects true or false. Write it without quotes: true."),
        ("[compile]\nenable = 1", "expects true or false."),
        ('[compile]\ncomponents = "model"', "expects a list of strings."),
        ("[compile]\ncomponents = [1]", "expects a list of strings."),
        ("[model]\nflavor = 8", "expects a string."),
        ("[model]\noverrides = 8", "expects a table."),
        ("[debug]\nseed = 1.5", "expects an integer or None."),
        (
            "[parallelism]\nmodule_fqns_per_model_part = ['a']",
            "expects a list of lists of strings or None.",
        ),
        ("[training.steps]\nx = 1", "expects an integer."),
    ],
)
def test_values_of_the_wrong_type_in_a_file(line, expects, tmp_path):
    fault = fault_in(tmp_path, line)
    assert str(fault).endswith(expects)
    assert fault.source.startswith(str(tmp_path / "run.toml:"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--training.steps 1e3", 'training.steps = "1e3" (command line): expects an integer.'),
        ("--training.steps", "training.steps (command line): needs a value: an integer."),
        ("--training.steps 3 4", "takes one value, an integer."),
        ("--training.dtype float16", 'expects one of "bfloat16", "float32".'),
        ("--compile.enable True", "Write --compile.enable, or --compile.no_enable."),
        ("--compile.enable=true", "Write --compile.enable, or --compile.no_enable."),
        ("--no-compile.enable", "--no-compile.enable (command line): no such option."),
        ("stray --training.steps 3", "stray (command line): belongs to no option."),
        ("training.steps 3", "training.steps (command line): belongs to no option. Did you mean --training.steps?"),
        ("model.overrides.dim 3", "model.overrides.dim (command line): belongs to no option."),
        ("--model.overrides 4", 'model.overrides = "4" (command line): expects a table.'),
        ("--model.overrides.n_layers", "model.overrides.n_layers (command line): needs one value."),
        ("--training.dataset {path=", "expects a string or a table or a list of tables."),
    ],
)
def test_mistakes_on_the_command_line(line, says):
    assert says in str(the_fault(line.split()))


def test_the_parser_itself_prints_nothing(capfd):
    the_fault(["--training.steps", "x"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "setting", "says"),
    [
        ("[training\nsteps = 1", "job.config_file", "is not valid TOML"),
        ("[training]\nsteps = 1\nsteps = 2", "job.config_file", "is not valid TOML"),
        ("training = 3", "training", "is a section"),
        ("[nowhere]\nx = 1", "[nowhere]", "no such section."),
    ],
)
def test_files_that_do_not_fit(text, setting, says, tmp_path):
    fault = fault_in(tmp_path, text)
    assert fault.setting == setting
    assert says in str(fault)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"[job]\ndescription = '\xe9'")
    for path in (tmp_path, tmp_path / "latin.toml"):
        assert the_fault(["--job.config_file", str(path)]).setting == "job.config_file"


@pytest.mark.parametrize(
    ("asked", "ours"),
    [
        ("./torchtitan/models/llama3/train_configs/debug_model.toml", "llama3/debug_model.toml"),
        ("./torchtitan/models/llama3/train_configs/llama3_8b.toml", "llama3/8b.toml"),
        ("./torchtitan/models/llama3/train_configs/llama3_405b.toml", "llama3/405b.toml"),
        ("train_configs/lama3/debugmodel.toml", "llama3/debug_model.toml"),
    ],
)
def test_a_missing_file_is_answered_with_ours(asked, ours):
    fault = the_fault(["--job.config_file", asked])
    assert fault.reason == "no such file."
    assert fault.remedy.endswith(f"train_configs/{ours}?")
