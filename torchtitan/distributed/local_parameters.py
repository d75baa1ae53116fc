"""Lets a module compute with plain tensors where its parameters are DTensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor.placement_types import Placement


def use_local_parameters(
    module: nn.Module,
    grad_placements: Mapping[str, Sequence[Placement]],
    terms: Mapping[str, int] | None = None,
) -> None:
    """Make `module.<name>` give this rank's part of each named parameter, in place.

    grad_placements[name] says what the gradient of that part is: of a whole weight that ranks used
    for different work it is Partial, and FSDP adds the ranks' gradients up. Where terms[name] ranks
    each add the same part to a sum that they share, it is divided by as many. `named_parameters` and
    checkpoints see the DTensors as before.
    """
    owner, terms = type(module), terms or {}
    parts = {
        name: _local(name, tuple(where), terms.get(name, 1))
        for name, where in grad_placements.items()
    }
    module.__class__ = type(owner.__name__, (owner,), parts)


def _local(name: str, grad_placements: tuple[Placement, ...], terms: int) -> property:
    def get(self: nn.Module) -> torch.Tensor:
        parameter = self._parameters[name]
        # What FSDP has sharded, outside of forward, is on more mesh axes; it looks at that itself.
        if len(parameter.placements) > len(grad_placements):
            return parameter
        part = parameter.to_local(grad_placements=grad_placements)
        return part if terms == 1 else part / terms

    return property(get)
