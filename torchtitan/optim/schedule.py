"""Which learning rate a step has: warm up, hold, decay, as a pure function of the step."""

import math
from dataclasses import dataclass

from torchtitan.config.schema import LRScheduler

DECAYS = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""What is left of the peak (above the floor) when `progress` of the decay, 0 to 1, is done."""


def learning_rate(step: int, lr: float, scheduler: LRScheduler, total_steps: int) -> float:
    """Learning rate of optimizer step `step`; the first step is 1.

    total_steps is the run's training.steps; scheduler.total_steps replaces it where set, so that a
    shorter or longer run follows the same curve. With W warm-up steps, D decay steps and N in all:

        step <= W          lr * step / W
        step <= N + 1 - D  lr
        later              lr * (floor + (1 - floor) * decay(p)),  p = (step - (N + 1 - D)) / D

    floor being min_lr_factor. p is 1 one step after the last one, so the last step still learns
    (at lr / D with linear decay to 0) and a run that goes on past N stays at lr * floor.
    """
    phases = Phases.of(scheduler, total_steps)
    decayed_steps = step - phases.last_constant_step
    if step <= phases.warmup:
        return lr * step / phases.warmup
    if decayed_steps <= 0 or phases.decay == 0:
        return lr
    left = DECAYS[scheduler.decay_type](min(1.0, decayed_steps / phases.decay))
    return lr * (scheduler.min_lr_factor + (1.0 - scheduler.min_lr_factor) * left)


def describe_schedule(lr: float, scheduler: LRScheduler, total_steps: int) -> str:
    """The whole curve in a line for the start of a run, with what differs from what was asked."""
    phases = Phases.of(scheduler, total_steps)
    line = (
        f"learning rate {lr:g} over {phases.total} steps: warm-up {phases.warmup}, constant "
        f"{phases.total - phases.warmup - phases.decay}, {scheduler.decay_type} decay "
        f"{phases.decay} to {lr * scheduler.min_lr_factor:g}"
    )
    if scheduler.warmup_steps > phases.total:
        line += f"; lr_scheduler.warmup_steps = {scheduler.warmup_steps} is cut to the run's length"
    if total_steps > phases.total and phases.decay:
        line += f"; training.steps = {total_steps} goes on at the last value"
    return line


@dataclass(frozen=True)
class Phases:
    """Lengths in steps of the parts of a schedule; what is neither warm-up nor decay is constant."""

    warmup: int
    decay: int
    total: int

    @classmethod
    def of(cls, scheduler: LRScheduler, total_steps: int) -> "Phases":
        """Warm-up goes first: it is cut to the schedule, and decay to what warm-up leaves."""
        total = scheduler.total_steps or total_steps
        warmup = min(scheduler.warmup_steps, total)
        decay = total - warmup
        if scheduler.decay_ratio is not None:
            decay = min(decay, round(total * scheduler.decay_ratio))
        return cls(warmup, decay, total)

    @property
    def last_constant_step(self) -> int:
        return self.total + 1 - self.decay
