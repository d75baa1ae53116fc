"""torch.compile, block by block: equal blocks share one compiled graph."""

import torch
from torch import nn

from torchtitan.config.schema import Compile


def apply_compile(model: nn.Module, config: Compile) -> None:
    """Compile the model's blocks and its loss, as `compile.components` says, in place."""
    if not config.enable:
        return
    if "model" in config.components:
        for block in model.layers.values():
            # Not block.compile(): that would put the hooks FSDP adds later inside the graph.
            block.forward = torch.compile(block.forward, backend=config.backend, fullgraph=True)
    if "loss" in config.components:
        model.output.loss = torch.compile(
            model.output.loss, backend=config.backend, fullgraph=True
        )
