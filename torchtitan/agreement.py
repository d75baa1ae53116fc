"""Do all ranks run the same? Machines may have other files, other code, another PyTorch."""

import hashlib
import json
import socket
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.names import leaf_keys
from torchtitan.config.schema import JobConfig

PACKAGE = Path(__file__).parent
MAY_DIFFER = ("job.config_file",)
"""Keys that need not be the same: a file may lie elsewhere on another machine."""


def check_agreement(config: JobConfig) -> None:
    """Raise ConfigError, on all ranks, where one has another config or other code than rank 0.

    Collective. Such ranks would hang at the first thing that they do differently, or train models that
    drift apart without a word.
    """
    ours = facts(config)
    first = [ours]
    dist.broadcast_object_list(first)
    [expected] = first
    names = ours.keys() | expected.keys()
    differing = {name: ours.get(name) for name in names if ours.get(name) != expected.get(name)}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (socket.gethostname(), differing))
    if faults := list(_faults(expected, ranks)):
        raise ConfigError(faults)


def facts(config: JobConfig) -> dict[str, Any]:
    """What must be the same on all ranks, by name."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    keys = {key: value for key, value in leaf_keys(config).items() if key not in MAY_DIFFER}
    return keys | {"PyTorch": torch.__version__, "torchtitan's code": digest.hexdigest()[:12]}


def _faults(expected: dict[str, Any], ranks: list[tuple[str, dict[str, Any]]]) -> Iterator[Fault]:
    """One for each fact that differs somewhere, in the order of their names."""
    places: dict[str, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, (host, differing) in enumerate(ranks):
        for name, value in differing.items():
            shown = json.dumps(value, ensure_ascii=False, default=str)
            places[name][shown, host].append(rank)
    for name, found in sorted(places.items()):
        elsewhere = ", ".join(
            f"{value} on {host} (rank {', '.join(map(str, of_host))})"
            for (value, host), of_host in found.items()
        )
        reason = f"differs between ranks: it is {elsewhere}."
        yield Fault(name, reason, f"Start all machines as {ranks[0][0]} (rank 0) was.", expected.get(name))
