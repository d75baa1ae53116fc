"""Which Linear layers of a model are computed in low precision, and which are not."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.names import did_you_mean
from torchtitan.quantization.conversion import alike

Refuse = Callable[[nn.Module], str]
"""Why a layer, or the head, is left; empty where it need not be."""
Widths = Mapping[str, tuple[int, int]]
"""Of layers by name, the widths (out, in) that a tensor-parallel rank multiplies."""

HEAD = "output"
"""The output head's name."""
HIGH_PRECISION = "the loss is computed in high precision"
"""Why a head is left."""
_ROUTER = "router.gate"
"""What routers' names end with."""


def choose_layers(
    model: nn.Module, filters: Sequence[str], refuse: Refuse, refuse_head: Refuse, filter_key: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the Linear layers to convert; and of those to leave, with the reason of each.

    The output head counts as one. A layer is left where its name contains one of `filters`, or
    `refuse` says why, or of the head `refuse_head`. Raises ConfigError for a filter that no module's
    name contains.
    """
    names, filters = [name for name, _ in model.named_modules() if name], list(filter(None, filters))
    useless = [part for part in filters if not any(part in name for name in names)]
    if useless:
        raise ConfigError(_matches_nothing(part, names, filter_key) for part in useless)
    converted, left = [], {}
    for name, module in model.named_modules():
        if name != HEAD and not isinstance(module, nn.Linear):
            continue
        if reason := _why_left(name, module, filters, refuse_head if name == HEAD else refuse):
            left[name] = reason
        else:
            converted.append(name)
    return tuple(converted), left


def _why_left(name: str, module: nn.Module, filters: Sequence[str], refuse: Refuse) -> str:
    if any(part in name for part in filters):
        return "filter"
    if name.endswith(_ROUTER):
        return "routers choose in high precision"
    if name != HEAD and type(module) is not nn.Linear:
        return "converted already"
    return refuse(module)


def _matches_nothing(part: str, names: list[str], filter_key: str) -> Fault:
    ends = {end for name in names for end in (name, *name.split("."))}
    remedy = did_you_mean(part, sorted(ends), "Take it out of the list.")
    return Fault(filter_key, "is in the name of no module.", remedy, part)


def split_faults(name: str, widths: Widths, multiple: int, degree: int) -> Iterator[Fault]:
    """A fault where tensor parallelism splits layers to widths that are no multiples."""
    odd = {layer: shape for layer, shape in widths.items() if any(n % multiple for n in shape)}
    if odd:
        kinds = dict.fromkeys((alike(layer), shape) for layer, shape in odd.items())
        layers = ", ".join(f"{layer} to {rows} x {columns}" for (layer, (rows, columns)) in kinds)
        reason = f"splits {layers}, and {name} needs multiples of {multiple}."
        remedy = "Use a smaller degree, or filter these layers."
        yield Fault("parallelism.tensor_parallel_degree", reason, remedy, degree)
