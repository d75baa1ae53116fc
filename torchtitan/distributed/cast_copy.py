"""Copies of parameters in the compute dtype, which the optimizer may write together with them."""

import weakref
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import increment_version

from torchtitan.distributed.local_parts import local_part, with_local_part


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is memory and nothing else, which torchao's wrappers of weights are not."""
    return type(tensor) in (torch.Tensor, nn.Parameter)


class CastCopy:
    """A copy of a parameter, or of this rank's part of it, in another dtype: a leaf in its place.

    A backward leaves its gradient, in the copy's dtype, to the parameter. A second one in a step makes
    it the parameter's dtype, in which they add up.
    """

    def __init__(self, source: nn.Parameter, dtype: torch.dtype):
        self.tensor = nn.Parameter(torch.empty_like(local_part(source.detach()), dtype=dtype))
        self._source = weakref.ref(source)
        self._versions = (-1, -1)
        source.grad_dtype = None  # any
        self.tensor.register_post_accumulate_grad_hook(partial(_hand_over, self._source))

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the parameter, if it has changed since: by what autograd counts, so not by `.data`."""
        source = self._source()
        self.tensor.requires_grad_(source.requires_grad)
        if self._versions != _versions(source):
            self.tensor.copy_(local_part(source))
            self._versions = _versions(source)

    @torch.no_grad()
    def written(self) -> None:
        """To be called by whoever wrote parameter and copy, and did not say so to autograd."""
        increment_version(self._source())
        self._versions = _versions(self._source())


# No method: from the hook, which is C++'s, a cycle would lead to the tensor, and nobody would find it.
def _hand_over(of: weakref.ref[nn.Parameter], tensor: torch.Tensor) -> None:
    source, grad, tensor.grad = of(), tensor.grad, None
    grad = with_local_part(source, grad)
    source.grad = grad if source.grad is None else source.grad.to(source.dtype).add_(grad)


def _versions(parameter: nn.Parameter) -> tuple[int, int]:
    """Operators change a DTensor, checkpoints the part of it that is here."""
    return parameter._version, local_part(parameter)._version


def keep_copy(parameter: nn.Parameter, dtype: torch.dtype) -> CastCopy:
    """Make the parameter's copy, for as long as it lives."""
    parameter._cast_copy = CastCopy(parameter, dtype)
    return parameter._cast_copy


def cast_copy(parameter: nn.Parameter) -> CastCopy | None:
    """The copy that a module computes with in the parameter's place; None where none is kept."""
    return getattr(parameter, "_cast_copy", None)
