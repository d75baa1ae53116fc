"""What modules see of their parameters: this rank's part of a DTensor, or a copy in another dtype.

`named_parameters`, optimizers and checkpoints see the parameters themselves.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.distributed.tensor.placement_types import Placement

from torchtitan.distributed.cast_copy import cast_copy, is_plain, keep_copy
from torchtitan.distributed.local_parts import local_part


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


def use_cast_parameters(
    model: nn.Module, modules: Iterable[nn.Module], dtype: torch.dtype, kept: bool
) -> None:
    """Make these modules of `model` compute with copies of their parameters in `dtype`, in place.

    Gradients add up in the parameters' own dtype. Where copies are not `kept`, one is made at each use,
    in a compiled block by one of its kernels: what FSDP does on a single rank takes three times the
    traffic. Kept, they are made anew where a parameter has changed; see `CastCopy`. Parameters of several
    modules, and wrappers of torchao, are cast at each use in any case.
    """
    named = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
    uses = Counter(id(parameter) for _, _, parameter in named)
    views: dict[nn.Module, dict[str, View]] = {}
    places = []
    for module, name, parameter in named:
        keeps = kept and uses[id(parameter)] == 1 and is_plain(local_part(parameter))
        views.setdefault(module, {})[name] = _Kept() if keeps else _Cast(dtype)
        places += [(module, name)] if keeps else []
    for module, of_module in views.items():
        _show(module, of_module)
        module._cast_copies = {}
    if places:
        model.register_forward_pre_hook(lambda *_: _refresh(places, dtype))


def _refresh(places: Sequence[tuple[nn.Module, str]], dtype: torch.dtype) -> None:
    for module, name in places:
        parameter = module._parameters[name]
        if (copy := cast_copy(parameter)) is None:
            copy = keep_copy(parameter, dtype)
            module._cast_copies[name] = copy.tensor
        copy.refresh()


@dataclass(frozen=True)
class _Local:
    grad_placements: tuple[Placement, ...]
    terms: int

    def __call__(self, module: nn.Module, name: str) -> torch.Tensor:
        parameter = module._parameters[name]
        # What FSDP has sharded, outside of forward, is on more mesh axes; it looks at that itself.
        if len(parameter.placements) > len(self.grad_placements):
            return parameter
        part = parameter.to_local(grad_placements=self.grad_placements)
        return part if self.terms == 1 else part / self.terms


@dataclass(frozen=True)
class _Cast:
    dtype: torch.dtype

    def __call__(self, module: nn.Module, name: str) -> torch.Tensor:
        return local_part(module._parameters[name]).to(self.dtype)


@dataclass(frozen=True)
class _Kept:
    def __call__(self, module: nn.Module, name: str) -> torch.Tensor:
        # Before the first forward there are none, and who asks wants a shape.
        return module._cast_copies.get(name, module._parameters[name])


View = Callable[[nn.Module, str], torch.Tensor]


def _show(module: nn.Module, views: Mapping[str, View]) -> None:
    module.__class__ = _with_views(type(module), tuple(views.items()))


@cache  # equal modules must have one class, or each would be compiled by itself
def _with_views(owner: type[nn.Module], views: tuple[tuple[str, View], ...]) -> type[nn.Module]:
    return type(owner.__name__, (owner,), {name: _shown(name, view) for name, view in views})


def _shown(name: str, view: View) -> property:
    return property(lambda self: view(self, name))
