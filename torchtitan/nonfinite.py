"""Where did numbers stop being finite? Asked after a step whose loss or gradient is not."""

import re
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from torchtitan.config.schema import Compile
from torchtitan.data.batch import Batch
from torchtitan.distributed.local_parts import local_part
from torchtitan.expert_load import ExpertLoad
from torchtitan.model_parts import ModelParts
from torchtitan.models.moe.experts import GroupedExperts
from torchtitan.models.moe.router import Routing


def why_not_finite(load: ExpertLoad, model: ModelParts, compiling: Compile, batch: Batch) -> str:
    """In words: a rank without room, else the first module whose output is not finite, or gradient.

    Collective. `batch` is what the step was taken on: its forward is done once more, a sequence at a
    time, on the same weights. Its gradients must still be there.
    """
    if cause := load.overflow():
        return cause
    compiled = compiling.enable and "model" in compiling.components
    modules = _nonfinite_outputs(model, compiled, batch)
    weights = [name for name, weight in model.named_parameters() if not _is_finite(weight.grad)]
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (min(modules, default=None), weights))
    outputs = [(*place, rank) for rank, (place, _) in enumerate(found) if place is not None]
    if outputs:
        *_, name, rank = min(outputs)
        return f"the output of {name or 'the model'} is the first that is not finite, on rank {rank}"
    # Backward came to the last and deepest one first.
    names = [name for _, names in found for name in reversed(names)]
    return f"the gradient of {max(names, key=_depth)} is the first that is not finite" if names else ""


def _nonfinite_outputs(model: ModelParts, compiled: bool, batch: Batch) -> list[tuple[int, int, str]]:
    """This rank's modules whose output is not finite: depth, number of modules before it, name.

    Compiled layers are looked at as a whole: their graphs have no hooks.
    """
    found: list[tuple[int, int, str]] = []
    before = count()

    def look(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        leaves = tree_leaves(vars(output) if isinstance(output, Routing) else output)
        place = (_depth(name), next(before), name)
        if not all(map(_is_finite, leaves)):
            found.append(place)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            inside = compiled and re.match(r"layers\.\d+\.", name)
            if not inside and not isinstance(module, GroupedExperts):  # rows of no token hold anything
                stack.enter_context(module.register_forward_hook(partial(look, name)))
        stack.callback(model.train)
        model.train(False)
        for i, lengths in enumerate(batch.document_lengths):
            before = count()
            tokens, labels = batch.tokens[i : i + 1], batch.labels[i : i + 1]
            model.loss(replace(batch, tokens=tokens, labels=labels, document_lengths=[lengths]))
    return found


def _is_finite(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    return bool(local_part(value).isfinite().all())


def _depth(name: str) -> int:
    """How far a module or weight is from the tokens: in layers, what comes after them behind all."""
    layer = re.search(r"layers\.(\d+)\.", f"{name}.")
    return int(layer[1]) if layer else -1 if name.startswith("tok_embeddings") else 10**9
