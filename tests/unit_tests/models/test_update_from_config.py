"""A run's facts go into a new config: flavors stay as they are, and refusals do not hang on asserts."""

import copy
import importlib
import os
import subprocess
import sys

import pytest
import torch

from tests.unit_tests.models.test_llama3 import build
from torchtitan.config.schema import JobConfig, Training, Validation
from torchtitan.models.registry import families, model_config

TOKENS = torch.arange(16)[None]
SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 48}


def job(seq_len, validation_seq_len=None):
    validation = Validation(enable=validation_seq_len is not None, seq_len=validation_seq_len or 1)
    return JobConfig(training=Training(seq_len=seq_len), validation=validation)


@pytest.mark.parametrize("family", families())
def test_no_flavor_is_ever_changed(family):
    flavors = importlib.import_module(f"torchtitan.models.{family}").FLAVORS
    before = copy.deepcopy(flavors)
    for name, flavor in flavors.items():
        assert flavor.update_from_config(job(64, 96)).seq_len == 96
        assert model_config(family, name, {"norm_eps": 0.5}).norm_eps == 0.5
        assert flavor == before[name]


def test_two_models_in_one_process_do_not_influence_each_other():
    def loss(config):
        model = build(config)
        return lambda: model(TOKENS, TOKENS).item()

    def config(seq_len, **overrides):
        flavor = model_config("llama3", "debugmodel", SMALL | overrides)
        return flavor.update_from_config(job(seq_len))

    alone = loss(config(16))()
    first = loss(config(16))
    second = loss(config(32, rope_theta=100.0, attn_mask_type="block_causal"))
    other = second()
    assert first() == alone
    assert second() == other != alone


BAD = [
    "--model.flavor=debugmodel",
    "--parallelism.tensor_parallel_degree=2",
    "--training.seq_len=7",
    "--model.overrides.n_kv_heads=3",
    "--optimizer.beta1=2",
    "--training.dataset=nothing",
]


def test_python_without_asserts_refuses_the_same():
    answers = []
    for flags in ([], ["-O"]):
        command = [sys.executable, *flags, "-m", "torchtitan.preflight", *BAD]
        environment = os.environ | {"NGPU": "2"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2, done.stderr
        assert "training.seq_len = 7" in done.stderr and "n_kv_heads = 3" in done.stderr
        answers.append(done.stderr)
    assert answers[0] == answers[1]
