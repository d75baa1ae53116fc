"""What is wrong with a run's inputs, in words a user can act on."""

import json
import traceback
from collections.abc import Iterable
from dataclasses import dataclass

EXIT_CONFIG = 2
"""Exit status of a run that was refused before any process group started."""


@dataclass(frozen=True)
class Fault:
    """One mistake: the setting's key path (or file), its value, why it cannot work, what would."""

    setting: str
    reason: str
    remedy: str = ""
    value: object = None
    source: str = ""
    """File and line the value came from, or 'command line'; empty where unknown."""

    def __str__(self) -> str:
        head = self.setting
        if self.value is not None:  # shown as TOML spells it: true, "text"
            head += f" = {json.dumps(self.value, ensure_ascii=False, default=str)}"
        where = f" ({self.source})" if self.source else ""
        return f"{head}{where}: {self.reason}" + (f" {self.remedy}" if self.remedy else "")


class ConfigError(ValueError):
    """A run that cannot work as asked; lists every fault found, not just the first."""

    def __init__(self, faults: Iterable[Fault]):
        self.faults = tuple(faults)
        super().__init__("\n".join(f"- {fault}" for fault in self.faults))


def with_place(error: Exception) -> str:
    """What a module of the user's raised, and at which line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
