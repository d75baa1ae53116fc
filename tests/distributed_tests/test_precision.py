"""One precision policy on every layout: activations, gradients, router and loss have the same dtypes."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.distributed_tests.test_data_parallel import build, global_batch
from tests.distributed_tests.test_moe_layouts import moe, parallel
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.styles import loss_layout
from torchtitan.models.moe.router import Routing

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
LAYOUTS = {
    "fsdp2": (2, {}),
    "replicate2": (2, {"replicate": 2}),
    "tp2": (2, {"tp": 2}),
    "tp2 ep2, no sp": (2, {"tp": 2, "ep": 2, "sp": False}),
    "ep2, full ac": (2, {"ep": 2, "ac": "full"}),
}


def dtypes(layout):
    """By name: of what each module returns, and of each gradient that two microbatches add up to."""
    config = parallel(**layout)
    config = replace(config, training=replace(config.training, mixed_precision_param="bfloat16"))
    degrees, model = build(moe(), config)
    found = {}

    def note(name):
        def hook(module, inputs, output):
            leaves = vars(output).values() if isinstance(output, Routing) else tree_leaves(output)
            found[name] = {tensor.dtype for tensor in leaves if tensor.is_floating_point()}

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    with loss_layout(degrees.tp, config.parallelism):
        for _ in range(2):  # that of a single microbatch is sometimes left as it was computed
            model(*global_batch()).backward()
    return found, {name: p.grad.dtype for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def alone():
    return run_ranks(dtypes, 1, {})[0]


def test_router_and_loss_are_in_fp32_and_the_rest_is_not(alone):
    outputs, gradients = alone
    exact = {name for name, found in outputs.items() if found == {FLOAT32}}
    assert exact == {"", "output", "layers.1.moe.router", "layers.2.moe.router"}
    assert all(found == {BFLOAT16} for name, found in outputs.items() if name not in exact)
    assert set(gradients.values()) == {FLOAT32}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_computes_in_the_same_dtypes(alone, name):
    world_size, layout = LAYOUTS[name]
    for found in run_ranks(dtypes, world_size, layout):
        assert found == alone
