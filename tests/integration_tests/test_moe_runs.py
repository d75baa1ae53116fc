"""Runs with experts, launched as a user launches them: odd lengths, layouts, a large config cut down."""

import math

import pytest

from tests.integration_tests.run_tests import REPO, assert_same_curve, launch, losses

FLAVORS = {"qwen3": "debugmodel_moe", "deepseek_v3": "debugmodel"}
ODD = """
[model]
name = "{family}"
flavor = "{flavor}"

[model.overrides]
n_layers = 2

[training]
seq_len = 7
local_batch_size = {batch}
global_batch_size = 3
steps = 3
mixed_precision_param = "float32"

[parallelism]
{parallelism}

[metrics]
log_freq = 1

[debug]
seed = 3
"""
TP_EP = "tensor_parallel_degree = 2\nexpert_parallel_degree = 2\n"


def odd_config(folder, family, parallelism):
    file = folder / "odd.toml"
    flavor = FLAVORS[family]
    file.write_text(ODD.format(family=family, flavor=flavor, batch=3, parallelism=parallelism))
    return file


@pytest.mark.parametrize("family", FLAVORS)
def test_odd_lengths_train_without_sequence_parallelism(tmp_path, family):
    """7 tokens a sequence, 21 in all, over 2 tensor-parallel ranks: the dispatcher pads."""
    free = odd_config(tmp_path, family, f"{TP_EP}enable_sequence_parallel = false")
    launch(free, [f"--job.dump_folder={tmp_path / 'two'}"], ngpu=2)
    one = odd_config(tmp_path, family, "")
    launch(one, [f"--job.dump_folder={tmp_path / 'one'}"])
    assert_same_curve(losses(tmp_path / "two"), losses(tmp_path / "one"), tolerance=1e-6)


@pytest.mark.parametrize("family", FLAVORS)
def test_odd_lengths_are_refused_with_sequence_parallelism(tmp_path, family):
    config = odd_config(tmp_path, family, TP_EP)
    output = launch(config, [f"--job.dump_folder={tmp_path / 'run'}"], ngpu=2, status=2)
    assert "training.seq_len = 7" in output and "Use 6 or 8" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_large_config_trains_cut_down(tmp_path):
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "vocab_size": 2048}
    experts = {"num_experts": 16, "ffn_dim": 32}
    overrides = [f"--model.overrides.{name}={size}" for name, size in sizes.items()]
    overrides += [f"--model.overrides.moe.{name}={size}" for name, size in experts.items()]
    argv = [
        *overrides,
        f"--job.dump_folder={tmp_path}",
        "--model.hf_assets_path=./tests/assets/tokenizer",
        "--training.dataset=c4_test",
        "--training.seq_len=64",
        "--training.steps=6",
        "--lr_scheduler.warmup_steps=2",
        "--parallelism.expert_parallel_degree=2",
        "--compile.no_enable",
        "--metrics.log_freq=1",
        "--debug.seed=5",
    ]
    launch(REPO / "train_configs/qwen3/30b_a3b.toml", argv, ngpu=2)
    found = losses(tmp_path)
    assert len(found) == 6 and found[-1] < found[0] and abs(found[0] - math.log(2048)) < 1.5
