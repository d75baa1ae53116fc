"""May the optimizer use this gradient? What happens where loss or gradient is not finite."""

import math
from collections.abc import Callable

from torchtitan.config.schema import Training
from torchtitan.logging import logger


class NonFinite(RuntimeError):
    """The loss or a gradient is not finite, and the run must not go on."""


class NonFiniteGuard:
    """Skips steps or ends the run, as training.on_nonfinite says; one a rank, for the whole run."""

    def __init__(self, config: Training):
        self.config = config
        self.num_skipped = 0

    def may_step(
        self, step: int, loss: float, norm: float, why: Callable[[], str] = lambda: ""
    ) -> bool:
        """Whether to take the optimizer step; all ranks see the same global values, and agree.

        Where they are not finite all ranks ask `why`, which says "" where it does not know. Raises
        NonFinite under "stop", and after more than max_skipped_steps skips in a row.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.num_skipped = 0
            return True
        self.num_skipped += 1
        cause = why()
        what = f"step {step}: loss {loss}, gradient norm {norm}{cause and f' ({cause})'}"
        config = self.config
        if config.on_nonfinite == "stop" or self.num_skipped > config.max_skipped_steps:
            skipped = f" after {self.num_skipped - 1} skipped steps" if self.num_skipped > 1 else ""
            raise NonFinite(f"{what}{skipped}; weights and checkpoints are those of before")
        logger.warning(f"{what}; the step is skipped")
        return False
