"""What a converter did to a model: which modules it exchanged, and which it left for what reason."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

PartHook = Callable[[nn.Module], None]
"""Is given a part of the model that a rank holds, spread over its ranks."""


@dataclass(frozen=True)
class Conversion:
    """The outcome of one converter; names are those of modules of the whole model."""

    name: str
    """The converter's, as in model.converters."""
    converted: tuple[str, ...]
    left: Mapping[str, str]
    """Modules of the same kind that stay as they are, each with the reason."""
    kind: str = "modules"
    """What was looked at, in the plural."""
    recipe: str = ""
    filter_key: str = "model.converters"
    """The key that says what is left, for the error where nothing else is."""
    weights_changed: PartHook | None = None
    """Called with each part of the model after optimizer steps and after loading."""

    def __str__(self) -> str:
        """A line for the start of a run."""
        recipe = f" ({self.recipe})" if self.recipe else ""
        count, total = len(self.converted), len(self.converted) + len(self.left)
        line = f"{self.name}{recipe}: {count} of {total} {self.kind} converted"
        return f"{line}; left: {self.left_in_words()}" if self.left else line

    def left_in_words(self) -> str:
        """What is left and why; layers that are alike are named once."""
        kinds = Counter((alike(name), reason) for name, reason in self.left.items())
        return ", ".join(
            f"{name} ({reason})" if count == 1 else f"{count} {name} ({reason})"
            for (name, reason), count in kinds.items()
        )


def alike(name: str) -> str:
    """The name that layers have in common: a star in place of numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
