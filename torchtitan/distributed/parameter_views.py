"""What modules see of their parameters: this rank's part of a DTensor, or a copy in another dtype.

`named_parameters`, optimizers and checkpoints see the parameters themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

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
    each add the same part to a sum that they share, it is divided by as many.
    """
    terms = terms or {}
    _show(module, {n: _Local(tuple(where), terms.get(n, 1)) for n, where in grad_placements.items()})


def use_cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Make all modules of `model` compute with copies of their parameters in `dtype`, in place.

    Gradients arrive in the parameters' own dtype, and add up in it. A copy is made at each use, in a
    compiled block by one of its kernels: what FSDP does on a single rank takes three times the traffic.
    """
    for module in model.modules():
        names = [name for name, parameter in module._parameters.items() if parameter is not None]
        if names:
            _show(module, dict.fromkeys(names, _Cast(dtype)))


@dataclass(frozen=True)
class _Local:
    grad_placements: tuple[Placement, ...]
    terms: int

    def __call__(self, parameter: nn.Parameter) -> torch.Tensor:
        # What FSDP has sharded, outside of forward, is on more mesh axes; it looks at that itself.
        if len(parameter.placements) > len(self.grad_placements):
            return parameter
        part = parameter.to_local(grad_placements=self.grad_placements)
        return part if self.terms == 1 else part / self.terms


@dataclass(frozen=True)
class _Cast:
    dtype: torch.dtype

    def __call__(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.to(self.dtype)


View = Callable[[nn.Parameter], torch.Tensor]


def _show(module: nn.Module, views: Mapping[str, View]) -> None:
    module.__class__ = _with_views(type(module), tuple(views.items()))


@cache  # equal modules must have one class, or each would be compiled by itself
def _with_views(owner: type[nn.Module], views: tuple[tuple[str, View], ...]) -> type[nn.Module]:
    return type(owner.__name__, (owner,), {name: _shown(name, view) for name, view in views})


def _shown(name: str, view: View) -> property:
    return property(lambda self: view(self._parameters[name]))
