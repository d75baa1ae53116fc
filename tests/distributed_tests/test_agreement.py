"""Machines that were started with another config, other code or another PyTorch are named, not trained on."""

import socket

import pytest
import torch
import torch.distributed as dist

from torchtitan import agreement
from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.distributed.launch import run_ranks


def disagree(what, folder):
    """What this rank is told where its last rank differs; nothing where it does not."""
    last = dist.get_rank() == dist.get_world_size() - 1
    argv = ["--training.steps=5", f"--job.config_file={folder / f'{dist.get_rank()}.toml'}"]
    if last and what == "config":
        argv += ["--optimizer.lr=1e-2", "--training.dataset=[{name = 'c4_test'}]"]
    if last and what == "PyTorch":
        torch.__version__ = "2.11.0"
    if last and what == "code":
        agreement.PACKAGE = folder
    try:
        agreement.check_agreement(load_config(argv))
    except ConfigError as error:
        return str(error)
    return ""


HOST = socket.gethostname()
REMEDY = f"Start all machines as {HOST} (rank 0) was."
WHERE = f"on {HOST} (rank 2). {REMEDY}"
SAID = {
    "nothing": [],
    "config": [
        f"- optimizer.lr = 0.0008: differs between ranks: it is 0.01 {WHERE}",
        '- training.dataset = "c4_test": differs between ranks: it is [{"name": "c4_test"}] ' + WHERE,
    ],
    "PyTorch": [f'- PyTorch = "{torch.__version__}": differs between ranks: it is "2.11.0" {WHERE}'],
}


@pytest.fixture
def folder(tmp_path):
    """A config file for each rank, the same in other places, and no code."""
    for rank in range(3):
        (tmp_path / f"{rank}.toml").touch()
    return tmp_path


@pytest.mark.parametrize("what", SAID)
def test_every_rank_says_what_differs_and_where(folder, what):
    for said in run_ranks(disagree, 3, what, folder):
        assert said.splitlines() == SAID[what]


def test_other_code_is_noticed(folder):
    for said in run_ranks(disagree, 3, "code", folder):
        assert said.startswith("- torchtitan's code = ") and said.endswith(WHERE)
