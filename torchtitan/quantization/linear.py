"""Which Linear layers of a model are computed in low precision, and which are not."""

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from torchtitan.config.names import nearest

Refuse = Callable[[nn.Linear], str]
"""Why a layer is left; empty where it need not be."""

_ALWAYS_LEFT = {"router.gate": "routers choose experts in high precision"}
"""By what their names end with."""
_NOT_LINEAR = {"output": "it computes the loss, in high precision"}


def choose(
    model: nn.Module, filters: Sequence[str], refuse: Refuse
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the Linear layers to convert; and of those to leave, with the reason of each.

    A layer is left where its name contains one of `filters`, or `refuse` says why.
    """
    converted, left = [], {}
    for name, module in model.named_modules():
        if reason := _why_left(name, module, filters, refuse):
            left[name] = reason
        elif isinstance(module, nn.Linear):
            converted.append(name)
    return tuple(converted), left


def _why_left(name: str, module: nn.Module, filters: Sequence[str], refuse: Refuse) -> str:
    if not isinstance(module, nn.Linear):
        return _NOT_LINEAR.get(name, "")
    always = (reason for end, reason in _ALWAYS_LEFT.items() if name.endswith(end))
    if any(part in name for part in filters):
        return "filter"
    return next(always, "") or refuse(module)
