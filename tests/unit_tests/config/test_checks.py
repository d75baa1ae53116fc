"""Each rule of bounds.py and checks.py: refused on the wrong side of its line, accepted on the right one."""

from pathlib import Path

import pytest

from torchtitan.config import bounds
from torchtitan.config.checks import check_config
from torchtitan.config.manager import load_config
from torchtitan.config.names import leaf_keys, section_names
from torchtitan.config.not_built import NOT_BUILT
from torchtitan.config.schema import JobConfig
from torchtitan.models.registry import families

ROOT = Path(__file__).parents[3]
OUR_FILES = sorted((ROOT / "train_configs").glob("*/*.toml"))
UPSTREAM_FILES = sorted(
    file
    for family in families()
    for file in (ROOT.parent / "shared" / "upstream_toml").glob(f"{family}_*.toml")
)
KEYS = leaf_keys(JobConfig)


def refused(line: str) -> set[str]:
    """Keys that the checks refuse, given what the command line sets."""
    return {fault.setting for fault in check_config(load_config(line.split()))}


def test_the_defaults_work():
    assert check_config(JobConfig()) == []


@pytest.mark.parametrize("file", OUR_FILES, ids=lambda file: file.stem)
def test_our_files_work(file):
    assert refused(f"--job.config_file {file}") == set()


@pytest.mark.parametrize("file", UPSTREAM_FILES, ids=lambda file: file.stem)
def test_upstreams_files_work(file):
    assert refused(f"--job.config_file {file}") == set()


@pytest.mark.parametrize("key", bounds.LEAST)
def test_counts_below_their_least_are_refused(key):
    least = bounds.LEAST[key]
    assert key in refused(f"--{key} {least - 1}")
    at_least = check_config(load_config([f"--{key}", str(least)]))
    assert not [fault for fault in at_least if fault.reason.startswith("must be at least")]


@pytest.mark.parametrize("key", bounds.NOT_EMPTY)
def test_an_empty_name_is_not_the_current_folder(key):
    (fault,) = check_config(load_config([f"--{key}", ""]))
    assert (fault.setting, fault.reason, fault.value) == (key, "is empty.", "")


@pytest.mark.parametrize("key", bounds.AT_LEAST_ONE_OR_ALL)
def test_minus_one_is_all_and_nothing_else_below_one(key):
    assert key in refused(f"--{key} 0")
    assert key in refused(f"--{key} -2")
    assert key not in refused(f"--{key} -1")
    assert key not in refused(f"--{key} 8")


@pytest.mark.parametrize("key", bounds.FRACTIONS)
def test_fractions(key):
    assert [key in refused(f"--{key} {value}") for value in ("-.1", 0, 1, 1.1, "nan")] == [
        True,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("key", bounds.CHOICES)
def test_unknown_names_are_refused(key):
    (fault,) = [f for f in check_config(load_config([f"--{key}", "qwerty"])) if f.value == "qwerty"]
    assert fault.setting == key
    for choice in bounds.CHOICES[key]:
        reasons = [fault.reason for fault in check_config(load_config([f"--{key}", choice]))]
        assert "no such name." not in reasons


def test_a_misspelt_name_is_answered_with_the_right_one():
    (fault,) = check_config(load_config(["--optimizer.name", "AdmaW"]))
    assert str(fault) == 'optimizer.name = "AdmaW": no such name. Did you mean "AdamW"?'


COMPILED = "--compile.enable"
HF_LOAD = "--checkpoint.enable --checkpoint.initial_load_in_hf"
HF_SAVE = "--checkpoint.enable --checkpoint.last_save_in_hf"
FLOAT8 = "--model.converters float8"
GATHERED = "--quantize.linear.float8.enable_fsdp_float8_all_gather"
SMALL = "--quantize.linear.float8.filter_fqns auto_filter_small_kn"
COMBINATIONS = [
    # what is refused, the command line, the same made right
    ("optimizer.beta1", "--optimizer.beta1 1", "--optimizer.beta1 0"),
    ("optimizer.beta2", "--optimizer.beta2 -.1", "--optimizer.beta2 .999"),
    ("training.max_norm", "--training.max_norm 0", "--training.max_norm inf"),
    (
        "model.hf_assets_path",
        "--model.hf_assets_path a/tokenizer.model",
        "--model.hf_assets_path a",
    ),
    (
        "training.global_batch_size",
        "--training.global_batch_size 12",
        "--training.global_batch_size 16",
    ),
    (
        "training.global_batch_size",
        "--training.global_batch_size 16 --parallelism.data_parallel_shard_degree 4",
        "--training.global_batch_size 32 --parallelism.data_parallel_shard_degree 4",
    ),
    (
        "training.dataloader.persistent_workers",
        "--training.dataloader.persistent_workers",
        "--training.dataloader.persistent_workers --training.dataloader.num_workers 1",
    ),
    (
        "validation.dataloader.prefetch_factor",
        "--validation.dataloader.prefetch_factor 2",
        "--validation.dataloader.prefetch_factor 2 --validation.dataloader.num_workers 1",
    ),
    (
        "activation_checkpoint.selective_ac_option",
        "--activation_checkpoint.selective_ac_option 0",
        "--activation_checkpoint.selective_ac_option 1",
    ),
    (
        "activation_checkpoint.selective_ac_option",
        "--activation_checkpoint.selective_ac_option ops",
        "--activation_checkpoint.selective_ac_option op",
    ),
    (
        "activation_checkpoint.mode",
        f"--activation_checkpoint.mode memory_budget {COMPILED} --compile.components loss",
        f"--activation_checkpoint.mode memory_budget {COMPILED}",
    ),
    (
        "profiling.profile_freq",
        "--profiling.enable_profiling --profiling.profile_freq 3",
        "--profiling.enable_profiling --profiling.profile_freq 4",
    ),
    ("checkpoint.keep_latest_k", "--checkpoint.keep_latest_k 1", "--checkpoint.keep_latest_k 2"),
    (
        "debug.deterministic_warn_only",
        "--debug.deterministic_warn_only",
        "--debug.deterministic_warn_only --debug.deterministic",
    ),
    (
        "checkpoint.initial_load_in_hf",
        f"{HF_LOAD} --checkpoint.no_initial_load_model_only",
        HF_LOAD,
    ),
    ("checkpoint.initial_load_in_hf", "--checkpoint.initial_load_in_hf", HF_LOAD),
    (
        "checkpoint.initial_load_in_hf_quantized",
        "--checkpoint.initial_load_in_hf_quantized",
        f"{HF_LOAD} --checkpoint.initial_load_in_hf_quantized",
    ),
    (
        "checkpoint.last_save_in_hf",
        f"{HF_SAVE} --checkpoint.no_last_save_model_only",
        HF_SAVE,
    ),
    ("checkpoint.last_save_in_hf", "--checkpoint.last_save_in_hf", HF_SAVE),
    ("checkpoint.last_save_in_hf", f"{HF_SAVE} --checkpoint.load_only", HF_SAVE),
    (
        "checkpoint.initial_load_path",
        "--checkpoint.initial_load_path a",
        "--checkpoint.initial_load_path a --checkpoint.enable",
    ),
    (
        "checkpoint.load_step",
        "--checkpoint.load_step 4",
        "--checkpoint.load_step 4 --checkpoint.enable",
    ),
    (
        "quantize.linear.float8.emulate",
        f"{FLOAT8} --quantize.linear.float8.emulate {COMPILED}",
        f"--quantize.linear.float8.emulate {COMPILED}",
    ),
    (
        "quantize.linear.float8.enable_fsdp_float8_all_gather",
        f"{FLOAT8} {GATHERED} --quantize.linear.float8.recipe_name rowwise",
        f"{FLOAT8} {GATHERED} --quantize.linear.float8.recipe_name tensorwise",
    ),
    (
        "quantize.linear.float8.enable_fsdp_float8_all_gather",
        f"{FLOAT8} {GATHERED} --training.enable_cpu_offload",
        f"{FLOAT8} --training.enable_cpu_offload",
    ),
    (
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
        f"{FLOAT8} --quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
        f"{FLOAT8} --quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp {GATHERED}",
    ),
    (
        "quantize.linear.float8.filter_fqns",
        f"{FLOAT8} {SMALL} --quantize.linear.float8.recipe_name rowwise_with_gw_hp",
        f"{FLOAT8} {SMALL}",
    ),
]


COMBINATIONS += [
    (key, f"--debug.batch_invariant --{key} {value}", f"--debug.batch_invariant --{key} {needed}")
    for key, value, needed in [
        ("parallelism.tensor_parallel_degree", "2", "1"),
        ("parallelism.context_parallel_degree", "2", "1"),
    ]
] + [
    ("compile.enable", "--debug.batch_invariant --compile.enable", "--compile.enable"),
    (
        "debug.moe_force_load_balance",
        "--debug.batch_invariant --debug.moe_force_load_balance",
        "--debug.batch_invariant",
    ),
]


@pytest.mark.parametrize(("key", "wrong", "right"), COMBINATIONS, ids=[c[1] for c in COMBINATIONS])
def test_combinations(key, wrong, right):
    assert refused(wrong) == {key}
    assert refused(right) == set()


NOT_BUILT_COMBINATIONS = [
    # the rule's key and reason; the switch itself is refused as well, as not built
    (
        "checkpoint.create_seed_checkpoint",
        "nothing is saved",
        "--checkpoint.create_seed_checkpoint",
    ),
    (
        "parallelism.expert_tensor_parallel_degree",
        "must be 1 or",
        "--parallelism.expert_parallel_degree 2 --parallelism.expert_tensor_parallel_degree 2",
    ),
    (
        "parallelism.enable_async_tensor_parallel",
        "not compiled",
        "--parallelism.enable_async_tensor_parallel",
    ),
    (
        "parallelism.enable_async_tensor_parallel",
        "sequence parallelism, which is off",
        f"--parallelism.enable_async_tensor_parallel {COMPILED} --parallelism.no_enable_sequence_parallel",
    ),
    (
        "parallelism.pipeline_parallel_microbatch_size",
        "does not divide",
        "--parallelism.pipeline_parallel_degree 2"
        " --parallelism.pipeline_parallel_microbatch_size 3",
    ),
]


@pytest.mark.parametrize(
    ("key", "reason", "wrong"), NOT_BUILT_COMBINATIONS, ids=[c[2] for c in NOT_BUILT_COMBINATIONS]
)
def test_combinations_of_what_is_not_built(key, reason, wrong):
    faults = check_config(load_config(wrong.split()))
    assert [fault for fault in faults if fault.setting == key and reason in fault.reason]


def test_expert_tensor_parallelism_is_free_without_experts_spread():
    """Upstream's llama4 files say expert_tensor_parallel_degree = 8 beside a degree of 1."""
    assert refused("--parallelism.expert_tensor_parallel_degree 8") == set()


def other_values(key: str, row) -> list[str]:
    """Command-line words that set a switch to something its row refuses."""
    default = KEYS[key]
    if row.refused:
        return [f"--{key}={value}" for value in row.refused]
    if isinstance(default, bool):
        section, _, name = key.rpartition(".")
        return [f"--{section}.no_{name}" if default else f"--{key}"]
    return [f"--{key}={2 if isinstance(default, int) else 'x'}"]


SWITCHES = [
    (key, word, row) for row in NOT_BUILT for key in row.switches for word in other_values(key, row)
]


@pytest.mark.parametrize(("key", "word", "row"), SWITCHES, ids=[case[1] for case in SWITCHES])
def test_what_is_not_built_is_refused_by_name(key, word, row):
    faults = check_config(load_config([word]))
    (fault,) = [fault for fault in faults if "is not built" in fault.reason]
    assert fault.setting == key
    assert row.feature in fault.reason


def test_the_table_names_keys_that_exist():
    for row in NOT_BUILT:
        assert set(row.switches) <= set(KEYS)
        assert set(row.settings) <= {*KEYS, *section_names(KEYS)}


def test_values_in_messages_are_spelt_as_in_toml():
    (fault,) = check_config(load_config(["--memory_estimation.enable"]))
    assert str(fault) == (
        "memory_estimation.enable = true: memory estimation is not built (planned). Use false. "
        "A dry run predicts memory: COMM_MODE=fake_backend ./run_train.sh."
    )
