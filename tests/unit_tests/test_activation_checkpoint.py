"""Checkpointing by operation inside compiled blocks."""

import logging

import torch
from torch import nn

from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import checkpoint_by_op


def test_torch_gives_no_advice():
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    advisor = logging.getLogger("torch._higher_order_ops.wrap")
    advisor.addHandler(handler)
    torch._logging._internal.warning_once.cache_clear()
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": nn.Linear(4, 4)})
    checkpoint_by_op(model, [], ActivationCheckpoint(mode="selective", selective_ac_option="op"))
    torch.compile(model.layers["0"].forward, backend="aot_eager")(torch.ones(2, 4)).sum().backward()
    advisor.removeHandler(handler)
    assert said == []
