"""Which parameters decay: every trainable parameter in exactly one optimizer group."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.distributed.mesh import by_mesh


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    no_decay: Sequence[str] = (),
) -> list[dict]:
    """Groups for a torch optimizer: what decays, then what a `no_decay` pattern exempts.

    Both are divided by mesh: foreach and fused kernels take the DTensors of one mesh at a time.
    Frozen parameters are in no group. Raises ConfigError if a pattern matches no parameter.
    """
    named = list(named_parameters)
    check_no_decay(no_decay, [name for name, _ in named])
    trainable = [(name, param) for name, param in named if param.requires_grad]
    exempt = [pair for pair in trainable if _matches(pair[0], no_decay)]
    decayed = [pair for pair in trainable if not _matches(pair[0], no_decay)]
    groups = [
        {"params": pairs, "weight_decay": decay}
        for some, decay in ((decayed, weight_decay), (exempt, 0.0))
        for pairs in by_mesh(some, key=lambda pair: pair[1])
    ]

    grouped = [id(param) for group in groups for _, param in group["params"]]
    expected = {id(param) for _, param in trainable}
    assert sorted(grouped) == sorted(expected), (
        f"{len(grouped)} parameters in groups, {len(expected)} trainable ones"
    )
    return groups


def check_no_decay(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError, with the nearest names, for each pattern that matches no parameter."""
    unmatched = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    # Layers differ in their number only: show each kind of parameter once, as a pattern to copy.
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    faults = [
        Fault(
            "optimizer.no_decay",
            "matches no parameter of the model.",
            f"The nearest names are {', '.join(get_close_matches(pattern, kinds, cutoff=0.0))}.",
            value=pattern,
        )
        for pattern in unmatched
    ]
    if faults:
        raise ConfigError(faults)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
