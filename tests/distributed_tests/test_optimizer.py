"""The optimizer over sharded parameters: one process's updates, and state that changes its mesh."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from torchtitan.config.schema import Optimizer
from torchtitan.distributed.launch import run_ranks
from torchtitan.optim.optimizer import build_optimizer, state_by_name

CONFIG = Optimizer(lr=1e-2, weight_decay=0.1, no_decay=["*.bias"])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def train(config, first, last, load=None, save=None, shard=True):
    """Weights and state after steps first..last; `late` gets gradients from step 4 on only.

    Rows do not divide by the ranks, and some ranks hold none: 5, 3 and 1.
    """
    torch.manual_seed(0)
    layers = {"inner": nn.Linear(4, 5), "outer": nn.Linear(5, 3), "late": nn.Linear(5, 1)}
    model = nn.ModuleDict(layers)
    if shard:
        for module in layers.values():
            fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = build_optimizer(model.named_parameters(), config)
    state = {"model": dict(model.named_parameters()), "optimizer": dict(state_by_name(optimizer))}
    if load:
        with torch.no_grad():
            dcp.load(state, checkpoint_id=load)
    for step in range(first, last + 1):
        hidden = model["inner"](torch.full((2, 4), 1.0 / step))
        loss = model["outer"](hidden).square().sum()
        if step >= 4:
            loss = loss + model["late"](hidden).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if save:
        dcp.save(state, checkpoint_id=save)
    tensors = {f"weight.{name}": whole(param) for name, param in model.named_parameters()}
    for name, moments in state_by_name(optimizer).items():
        tensors |= {f"{key}.{name}": whole(value) for key, value in moments.items()}
    return tensors


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_sharded_updates_and_a_resume_on_other_ranks_equal_one_process(tmp_path, implementation):
    config = replace(CONFIG, implementation=implementation)
    expected = train(config, 1, 6, shard=False)
    run_ranks(train, 3, config, 1, 3, None, tmp_path)
    for got in run_ranks(train, 2, config, 4, 6, tmp_path):
        assert set(got) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7, msg=name)
