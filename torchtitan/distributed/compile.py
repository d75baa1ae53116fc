"""torch.compile, block by block: equal blocks share one compiled graph."""

from collections.abc import Sequence

import torch
from torch import nn

from torchtitan.config.schema import Compile
from torchtitan.ops.cross_entropy import linear_cross_entropy


def apply_compile(model: nn.Module, exchanging: Sequence[str], config: Compile, place: str) -> None:
    """Compile the model's blocks and its loss, as `compile.components` says, in place.

    The loss from chunks of logits is a kernel already; only that of split logits is compiled.

    `place` is this rank's in the layout; code cached by another place is not taken for its own.
    `exchanging` are the MoE layers (module names) that send rows to other ranks. Their experts stay out
    of the block's graph: shapes follow the data, and experts have FSDP hooks of their own. The shared
    experts, which compute between sending and receiving, are a graph by themselves.
    """
    if not config.enable:
        return
    # Graphs of DTensors hold a rank's offsets and groups as constants, and torch's cache on disk, which
    # knows a graph by its mesh, would give one rank the code of another: losses are wrong from the second
    # start on (seen on 2.13 with a loss split over the vocabulary).
    torch.compiler.config.cache_key_tag = place
    if "model" in config.components:
        for name in exchanging:
            layer = model.get_submodule(name)
            layer.apply_experts = torch.compiler.disable(layer.apply_experts)
            if (shared := layer.shared_experts) is not None:
                shared.forward = torch.compile(shared.forward, backend=config.backend, fullgraph=True)
        for name, block in model.layers.items():
            whole = not any(layer.startswith(f"layers.{name}.") for layer in exchanging)
            # Not block.compile(): that would put the hooks FSDP adds later inside the graph.
            block.forward = torch.compile(block.forward, backend=config.backend, fullgraph=whole)
    head = model.output
    if "loss" in config.components and head is not None and head.loss is linear_cross_entropy:
        head.loss = torch.compile(head.loss, backend=config.backend, fullgraph=True)
