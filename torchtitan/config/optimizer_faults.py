"""Which settings of the optimizer cannot work, or would mean nothing?"""

from collections.abc import Iterator

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.optimizer_groups import KEY, read_groups
from torchtitan.config.schema import JobConfig, Optimizer

STOCHASTIC = ("AdamW", "AdamW8bit")
"""Optimizers that can round stochastically."""


def optimizer_faults(config: JobConfig) -> Iterator[Fault]:
    """Faults of the section [optimizer] that need no model to be seen."""
    yield from _momenta_are_below_1(config.optimizer)
    yield from _rounding_has_bf16_weights(config)
    yield from _implementation_is_there(config.optimizer)
    yield from _muon_has_its_settings(config.optimizer)
    yield from _groups_can_be_read(config.optimizer)


def _momenta_are_below_1(optimizer: Optimizer) -> Iterator[Fault]:
    for key in ("beta1", "beta2", "muon_momentum"):
        value = getattr(optimizer, key)
        if not 0 <= value < 1:
            yield Fault(f"optimizer.{key}", "must be at least 0 and below 1.", value=value)


def _rounding_has_bf16_weights(config: JobConfig) -> Iterator[Fault]:
    key, name = "optimizer.bf16_stochastic_round", config.optimizer.name
    if not config.optimizer.bf16_stochastic_round:
        return
    if config.training.dtype != "bfloat16":
        reason = f"rounds weights in bfloat16, and training.dtype is {config.training.dtype}."
        yield Fault(key, reason, 'Set training.dtype = "bfloat16".', True)
    if name not in STOCHASTIC:
        remedy = f'Set optimizer.name = {" or ".join(map(_quoted, STOCHASTIC))}.'
        yield Fault(key, f"is not known to {name}.", remedy, True)


def _implementation_is_there(optimizer: Optimizer) -> Iterator[Fault]:
    if optimizer.uses_torchao and optimizer.implementation == "foreach":
        reason = "is not one of torchao's: it updates parameter by parameter."
        remedy = 'Use "fused", a compiled kernel a parameter, or "for-loop", the same uncompiled.'
        yield Fault("optimizer.implementation", reason, remedy, "foreach")


def _muon_has_its_settings(optimizer: Optimizer) -> Iterator[Fault]:
    defaults = Optimizer()
    for key in ("muon_momentum", "muon_lr_adjustment"):
        value = getattr(optimizer, key)
        if optimizer.name != "Muon" and value != getattr(defaults, key):
            reason = f"is a setting of Muon, and optimizer.name is {optimizer.name}."
            yield Fault(f"optimizer.{key}", reason, value=value)


def _groups_can_be_read(optimizer: Optimizer) -> Iterator[Fault]:
    try:
        groups = read_groups(optimizer)
    except ConfigError as error:
        yield from error.faults
        return
    for n, group in enumerate(groups):
        if group.optimizer is not None and optimizer.name != "Muon":
            reason = f"is a choice between Muon and AdamW, and optimizer.name is {optimizer.name}."
            yield Fault(f"{KEY}[{n}].optimizer", reason, value=group.optimizer)


def _quoted(name: str) -> str:
    return f'"{name}"'
