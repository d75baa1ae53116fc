"""What holds for every family: FLOPs as PyTorch counts them, and what a run's config may ask."""

import copy
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.unit_tests.models.helpers import build
from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.models.attention_mask import Pattern
from torchtitan.models.flops import flops_per_token
from torchtitan.models.registry import families, model_config

ROOT = Path(__file__).parents[3]
FLAVORS = {
    f"{family}-{name}": flavor
    for family in families()
    for name, flavor in import_module(f"torchtitan.models.{family}").FLAVORS.items()
}


def update(line):
    """What update_from_config makes of a command line."""
    config = load_config(line.split())
    flavor = model_config(config.model.name, config.model.flavor, config.model.overrides)
    return flavor.update_from_config(config)


def refused(line):
    """The faults of a command line, as texts."""
    with pytest.raises(ConfigError) as error:
        update(line)
    return [str(fault) for fault in error.value.faults]


@pytest.mark.parametrize("name", FLAVORS)
def test_flops_equal_pytorchs_count(name):
    flavor = FLAVORS[name]
    config = replace(flavor, n_dense_layers=min(flavor.n_dense_layers, 1), seq_len=128)
    kinds = [config.is_moe_layer(layer_id) for layer_id in range(config.n_layers)]
    n_layers = max(kinds.index(kind) for kind in set(kinds)) + 1
    config = replace(config, n_layers=n_layers, attn_type="sdpa", attn_mask_type="causal")
    with torch.device("meta"):
        model = config.build()
        tokens = torch.zeros(1, 128, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens).backward()
    full, causal = flops_per_token(config, 128)
    assert counter.get_total_flops() / 128 == pytest.approx(full, rel=0.01)
    _, channels = config.attention_costs()
    assert full - causal == pytest.approx(3 * config.n_layers * channels * 128)


def test_windows_count_where_masks_do():
    """gpt-oss: half of the layers see 128 of 4096 tokens, the first 127 tokens fewer."""
    config = FLAVORS["gpt_oss-20b"]
    full, masked = flops_per_token(config, 4096)
    seen = [128 - 128 * 127 / 2 / 4096 - 0.5, 4096 / 2]
    assert full - masked == pytest.approx(6 * 2 * 64 * 64 * 12 * (2 * 4096 - sum(seen)))


def kinds(config):
    """What kinds of layers a model has."""
    layers = range(config.n_layers)
    return {(config.is_moe_layer(i), config.attention_pattern(i) == Pattern()) for i in layers}


MOE = "--model.name qwen3 --model.flavor debugmodel_moe --training.seq_len 64"
DEEPSEEK = "--model.name deepseek_v3 --model.flavor debugmodel --training.seq_len 64"


def test_the_returned_config_knows_the_runs_facts():
    config = update(
        f"{MOE} --debug.moe_force_load_balance --moe.experts_backend reference"
        " --moe.max_rows_per_chunk 512"
    )
    assert config.seq_len == 64
    assert config.moe.force_load_balance
    assert config.moe.experts_backend == "reference"
    assert config.moe.max_rows_per_chunk == 512
    experts = build(replace(config, n_layers=1)).layers["0"].moe.experts
    assert (experts.backend, experts.max_rows_per_chunk) == ("reference", 512)


@pytest.mark.parametrize("line", ["", MOE, DEEPSEEK])
def test_flavors_stay_as_they_are(line):
    """Two models built in one process have nothing to do with each other."""
    before = copy.deepcopy(FLAVORS)
    forced = "" if not line else "--debug.moe_force_load_balance --moe.max_rows_per_chunk 8"
    first = update(f"{line} {forced} --training.seq_len 32")
    second = update(f"{line} --training.seq_len 64")
    assert (first.seq_len, second.seq_len) == (32, 64)
    if line:
        assert first.moe.force_load_balance and not second.moe.force_load_balance
        assert (first.moe.max_rows_per_chunk, second.moe.max_rows_per_chunk) == (8, 0)
    assert FLAVORS == before


OUR_FILES = sorted((ROOT / "train_configs").glob("*/*.toml"))
UPSTREAM_FILES = sorted(
    file
    for family in families()
    for file in (ROOT.parent / "shared" / "upstream_toml").glob(f"{family}_*.toml")
)


@pytest.mark.parametrize("file", OUR_FILES + UPSTREAM_FILES, ids=lambda file: file.stem)
def test_the_models_of_config_files_fit_their_layouts(file):
    config = load_config(["--job.config_file", str(file)])
    change = ""
    if file.stem == "llama4_17bx128e":
        # One sequence a rank, which torch's 1F1B does not run through four stages.
        assert "training.local_batch_size = 1" in refused(f"--job.config_file {file}")[0]
        change = "--training.local_batch_size 4"
    assert update(f"--job.config_file {file} {change}").seq_len == config.training.seq_len


FAULTS = [
    ("--model.overrides.n_heads 0", "model.overrides.n_heads = 0: must be at least 1."),
    (
        f"{MOE} --model.overrides.moe.num_expert_groups 0",
        "model.overrides.moe.num_expert_groups = 0: must be at least 1.",
    ),
    (
        f"{MOE} --model.overrides.moe.score_func sigmoyd",
        "model.overrides.moe.score_func = \"sigmoyd\": no such name. Did you mean \"sigmoid\"? Known: "
        "softmax, sigmoid.",
    ),
    (
        "--model.overrides.moe.top_k 2",
        'model.overrides.moe = {"top_k": 2}: is a part that this flavor does not have.',
    ),
    (
        f"{MOE} --parallelism.expert_parallel_degree 6",
        "parallelism.expert_parallel_degree = 6: does not divide the 64 experts of a layer. "
        "Use 4 or 8.",
    ),
    (
        f"{MOE} --parallelism.expert_parallel_degree 128",
        "parallelism.expert_parallel_degree = 128: does not divide the 64 experts of a layer. "
        "Use 32 or 64.",
    ),
    (
        f"{MOE} --parallelism.expert_parallel_degree 2 --parallelism.tensor_parallel_degree 4"
        " --parallelism.expert_tensor_parallel_degree 4 --model.overrides.moe.ffn_dim 66",
        "parallelism.expert_tensor_parallel_degree = 4: does not divide the experts' width of 66. "
        "Use 1.",
    ),
    (
        f"{MOE} --parallelism.tensor_parallel_degree 4 --model.overrides.moe.ffn_dim 66",
        "parallelism.tensor_parallel_degree = 4: does not divide 66 (experts' width) of the model. "
        "Use 1 or 2.",
    ),
    (
        f"{DEEPSEEK} --parallelism.tensor_parallel_degree 4 --model.overrides.moe.ffn_dim 10"
        " --model.overrides.moe.num_shared_experts 1 --parallelism.expert_parallel_degree 2",
        "parallelism.tensor_parallel_degree = 4: does not divide 10 (shared experts' width) of the "
        "model. Use 1 or 2.",
    ),
    (
        "--parallelism.expert_parallel_degree 2",
        "parallelism.expert_parallel_degree = 2: the model has no experts. Use 1.",
    ),
    (
        "--debug.moe_force_load_balance",
        "debug.moe_force_load_balance = true: the model has no experts. Use false.",
    ),
    (
        "--moe.experts_backend reference",
        'moe.experts_backend = "reference": the model has no experts. Use "auto".',
    ),
    (
        f"{MOE} --model.overrides.moe.top_k 65",
        "model.overrides.moe.top_k = 65: must be between 1 and the experts a token chooses among, "
        "64. Use 1 to 64.",
    ),
    (
        f"{MOE} --model.overrides.moe.num_expert_groups 3",
        "model.overrides.moe.num_expert_groups = 3: does not divide the 64 experts. Use 2 or 4.",
    ),
    (
        f"{MOE} --model.overrides.moe.num_limited_groups 2",
        "model.overrides.moe.num_limited_groups = 2: must be between 1 and the number of groups, 1. "
        "Use 1.",
    ),
    (
        f"{MOE} --model.overrides.moe.num_expert_groups 64"
        " --model.overrides.moe.num_limited_groups 8",
        "model.overrides.moe.num_scores_per_group = 2: must be between 1 and the experts of a "
        "group, 1. Use 1.",
    ),
    (
        f"{MOE} --model.overrides.head_dim 31",
        "model.overrides.head_dim = 31: channels are rotated in pairs.",
    ),
    (
        f"{DEEPSEEK} --model.overrides.n_heads 8",
        "model.overrides.n_kv_heads = 16: latent attention has as many key/value heads as query "
        "heads, 8.",
    ),
    (
        f"{DEEPSEEK} --model.overrides.attn_type varlen"
        " --model.overrides.attn_mask_type block_causal",
        "model.overrides.attn_type = \"varlen\": the varlen kernel takes keys and values of one "
        "width, and here they have two. Use 'flex' or 'sdpa'.",
    ),
    (
        "--model.name gpt_oss --model.flavor debugmodel --model.overrides.attn_type varlen",
        "model.overrides.attn_type = \"varlen\": the varlen kernel gives no gradient to attention "
        "sinks. Use 'flex' or 'sdpa'.",
    ),
    (
        "--model.name llama4 --model.flavor debugmodel --model.overrides.moe_interval 0",
        "model.overrides.moe_interval = 0: must be at least 1.",
    ),
    (
        "--training.seq_len 2050 --parallelism.tensor_parallel_degree 4",
        "training.seq_len = 2050: with parallelism.tensor_parallel_degree = 4, sequence parallelism "
        "splits every sequence evenly over 4 ranks. Use 2048 or 2052, or set "
        "parallelism.enable_sequence_parallel = false.",
    ),
]


@pytest.mark.parametrize(("line", "message"), FAULTS, ids=[line for line, _ in FAULTS])
def test_what_cannot_work_is_refused_with_what_would(line, message):
    assert message in refused(line)


OWN_FAMILIES = {
    "own_gone.fam": (None, "no such name."),
    "own_pkg.fma": ("", "no such name."),
    "own_missing.fam": ("import not_installed", "cannot be used: No module named 'not_installed'."),
    "own_part.fam": ("from own_part import part", "cannot be used: cannot import name 'part' from"),
    "own_typo.fam": ("import math; math.pie", "cannot be used: module 'math' has no attribute 'pie'."),
    "own_empty.fam": ("", "cannot be used: module 'own_empty.fam' has no attribute 'FLAVORS'."),
}


@pytest.mark.parametrize("name", OWN_FAMILIES)
def test_a_family_elsewhere_that_cannot_be_used_says_why(tmp_path, monkeypatch, name):
    code, message = OWN_FAMILIES[name]
    package = tmp_path / name.partition(".")[0]
    if code is not None:
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "fam.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (fault,) = refused(f"--model.name {name}")
    assert fault.startswith(f'model.name = "{name}": {message}')


def test_all_faults_are_listed_at_once():
    faults = refused(
        f"{DEEPSEEK} --parallelism.expert_parallel_degree 3 --model.overrides.moe.top_k 9"
        " --parallelism.tensor_parallel_degree 3 --training.seq_len 200000"
        " --model.overrides.n_kv_heads 8"
    )
    settings = [fault.partition(" ")[0] for fault in faults]
    assert sorted(settings) == [
        "model.overrides.moe.top_k",
        "model.overrides.n_kv_heads",
        "parallelism.expert_parallel_degree",
        "parallelism.tensor_parallel_degree",
        "training.seq_len",  # beyond the positions
        "training.seq_len",  # and not even
    ]


def test_token_counts_of_experts_are_free():
    """The dispatcher pads: without sequence parallelism no length is refused."""
    layout = "--parallelism.tensor_parallel_degree 2 --parallelism.expert_parallel_degree 2"
    free = f"{layout} --parallelism.no_enable_sequence_parallel"
    assert update(f"{MOE} {free} --training.seq_len 7").seq_len == 7
    assert "sequence parallelism" in refused(f"{MOE} {layout} --training.seq_len 7")[0]


def test_dense_layers_only_bind_the_layouts_they_have():
    """Every layer has experts: the width of a feed-forward that nobody builds does not matter."""
    update(f"{MOE} --parallelism.tensor_parallel_degree 4 --model.overrides.ffn_dim 1022")
    dense = f"{DEEPSEEK} --parallelism.tensor_parallel_degree 4 --model.overrides.ffn_dim 1022"
    assert "1022 (FFN width)" in refused(dense)[0]


def test_mistakes_are_refused_without_assertions_too():
    code = (
        "from tests.unit_tests.models.test_families import MOE, update\n"
        "update(MOE + ' --parallelism.expert_parallel_degree 6')"
    )
    argv = [sys.executable, "-O", "-c", code]
    run = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert "does not divide the 64 experts" in run.stderr


@pytest.mark.parametrize("name", FLAVORS)
@pytest.mark.parametrize("tp", [1, 2, 8])
def test_shrunk_models_train_and_can_be_split(name, tp):
    config = replace(FLAVORS[name].shrunk(tp), seq_len=8)
    sizes = f"--parallelism.tensor_parallel_degree {tp} --training.seq_len 8"
    experts = "--parallelism.expert_parallel_degree 8" if config.n_moe_layers else ""
    assert config.update_from_config(load_config(f"{sizes} {experts}".split())) == config
    model = build(config)
    tokens = torch.randint(config.vocab_size, (2, 8))
    model(tokens, tokens).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert kinds(config) == kinds(FLAVORS[name])
