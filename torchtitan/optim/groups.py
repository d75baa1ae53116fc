"""Which parameters have which settings: every trainable parameter in exactly one group."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.optimizer_groups import KEY, OptimizerGroup, read_groups
from torchtitan.config.schema import Optimizer
from torchtitan.distributed.local_parts import by_mesh

NOT_MUONS = ("tok_embeddings.*", "output.*", "*.router.*", "*.b13", "*.b2")
"""What has two dimensions or more and is not Muon's, unless a table says so: both ends of the model,
routers, biases of experts."""


@dataclass(frozen=True)
class Settings:
    """What the parameters of a group have in common."""

    optimizer: str
    weight_decay: float
    lr_scale: float

    @classmethod
    def of(
        cls, name: str, num_dims: int, config: Optimizer, tables: Sequence[OptimizerGroup]
    ) -> "Settings":
        """The settings of one parameter; `tables` are the config's, read."""
        table = next((table for table in tables if _matches(name, table.patterns)), None)
        decay = 0.0 if _matches(name, config.no_decay) else config.weight_decay
        optimizer = config.name
        if optimizer == "Muon" and (num_dims < 2 or _matches(name, NOT_MUONS)):
            optimizer = "AdamW"
        if table is None:
            return cls(optimizer, decay, 1.0)
        if table.weight_decay is not None:
            decay = table.weight_decay
        return cls(table.optimizer or optimizer, decay, table.lr_scale)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: Optimizer
) -> dict[str, list[dict]]:
    """Groups of torch optimizers, by the name of the optimizer, in the order of the model.

    A group's parameters lie on one mesh: foreach and fused kernels take the DTensors of one mesh at a
    time. Frozen parameters are in no group.
    """
    tables = read_groups(config)
    trainable = [(name, param) for name, param in named_parameters if param.requires_grad]
    parts: dict[Settings, list[tuple[str, nn.Parameter]]] = {}
    for name, param in trainable:
        parts.setdefault(Settings.of(name, param.ndim, config, tables), []).append((name, param))
    groups: dict[str, list[dict]] = {}
    for settings, part in parts.items():
        groups.setdefault(settings.optimizer, []).extend(
            {"params": pairs, "weight_decay": settings.weight_decay, "lr_scale": settings.lr_scale}
            for pairs in by_mesh(part, key=lambda pair: pair[1])
        )

    grouped = [id(p) for some in groups.values() for group in some for _, p in group["params"]]
    expected = {id(param) for _, param in trainable}
    assert sorted(grouped) == sorted(expected), (
        f"{len(grouped)} parameters in groups, {len(expected)} trainable ones"
    )
    return groups


def check_patterns(config: Optimizer, num_dims: Mapping[str, int]) -> None:
    """Raise ConfigError for patterns that no parameter of the whole model fits.

    num_dims are the parameters' numbers of dimensions, by name.
    """
    names = list(num_dims)
    faults = [_unmatched("optimizer.no_decay", p, names) for p in config.no_decay if not _some(names, p)]
    taken: set[str] = set()
    for n, table in enumerate(read_groups(config)):
        where = f"{KEY}[{n}]"
        unmatched = [pattern for pattern in table.patterns if not _some(names, pattern)]
        faults += [_unmatched(f"{where}.patterns", pattern, names) for pattern in unmatched]
        matched = {name for name in names if _matches(name, table.patterns)}
        if not unmatched and matched <= taken:
            reason = "match only parameters that tables before it have taken."
            faults.append(Fault(f"{where}.patterns", reason, "Put it before them.", table.patterns))
        own = [name for name in names if name in matched - taken]
        if table.optimizer == "Muon":
            faults += _no_matrices(where, [name for name in own if num_dims[name] < 2])
        taken |= matched
    if faults:
        raise ConfigError(faults)


def _unmatched(setting: str, pattern: str, names: Sequence[str]) -> Fault:
    # Layers differ in their number only: show each kind of parameter once, as a pattern to copy.
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    near = ", ".join(get_close_matches(pattern, kinds, cutoff=0.0))
    reason = "matches no parameter of the model."
    return Fault(setting, reason, f"The nearest names are {near}.", value=pattern)


def _no_matrices(where: str, names: Sequence[str]) -> Iterator[Fault]:
    if names:
        reason = f"updates matrices, and {names[0]} is none."
        yield Fault(f"{where}.optimizer", reason, 'Use "AdamW" for it.', "Muon")


def _some(names: Sequence[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
