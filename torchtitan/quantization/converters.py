"""Converters exchange parts of a model before it is spread; `model.converters` names them, in order.

A converter is a function of the whole model, on the meta device, and the config. It changes the model
in place and says what it did. Names of parameters must stay as they are: weights are drawn by name,
and checkpoints keep them by name. A module named by experimental.custom_import adds its own:

    register_converter("my.converter", convert)
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.names import leaf_keys, present_name, unknown_value
from torchtitan.config.schema import JobConfig, Quantize
from torchtitan.distributed.mesh import Degrees
from torchtitan.quantization import float8, float8_experts, mx, mx_experts
from torchtitan.quantization.conversion import Conversion
from torchtitan.quantization.linear import Widths

__all__ = ["Conversion", "Converter", "convert", "register_converter"]

Convert = Callable[[nn.Module, JobConfig], Conversion]

ALIASES = {"float8": "quantize.linear.float8"}
"""Names that upstream's files use, and what they mean."""


@dataclass(frozen=True)
class Converter:
    """What a name in model.converters stands for."""

    convert: Convert
    device_faults: Callable[[JobConfig, torch.device], Iterable[Fault]] = lambda config, device: ()
    """Why a device cannot compute with what it makes."""
    layout_faults: Callable[[JobConfig, Widths, Degrees], Iterable[Fault]] = lambda *_: ()
    """Why what it makes cannot be split as the layout does."""
    emulated: Callable[[JobConfig], JobConfig] = lambda config: config
    """The config that makes what any CPU can compute with."""
    rounds: bool = False
    """Whether numbers are rounded to fewer bits: then layouts differ by more than their sums' order."""


_CONVERTERS: dict[str, Converter] = {
    module.NAME: Converter(
        module.convert, module.device_faults, module.layout_faults, module.emulated, rounds=True
    )
    for module in (float8, mx)
} | {
    module.NAME: Converter(
        module.convert, module.device_faults, emulated=module.emulated, rounds=True
    )
    for module in (float8_experts, mx_experts)
}


def register_converter(name: str, convert: Convert | Converter) -> None:
    """Make a converter known under a name; the last registration of a name counts."""
    _CONVERTERS[name] = convert if isinstance(convert, Converter) else Converter(convert)


def convert(model: nn.Module, config: JobConfig) -> tuple[Conversion, ...]:
    """Run the config's converters on a whole model on the meta device, in place.

    Raises ConfigError where one of them leaves all as it was.
    """
    conversions = tuple(converter.convert(model, config) for converter in _used(config))
    if faults := [_converts_nothing(done) for done in conversions if not done.converted]:
        raise ConfigError(faults)
    return conversions


def check_device(config: JobConfig, device: torch.device) -> None:
    """Raise ConfigError for converters whose results the device cannot compute with."""
    faults = [fault for converter in _used(config) for fault in converter.device_faults(config, device)]
    if faults:
        raise ConfigError(faults)


def check_layout(
    config: JobConfig, conversions: Iterable[Conversion], widths: Widths, degrees: Degrees
) -> None:
    """Raise ConfigError where what was converted cannot be split so.

    `widths` are those that a rank multiplies, of all weights of the model that are matrices, by module.
    """
    faults = []
    for converter, done in zip(_used(config), conversions, strict=True):
        own = {name: widths[name] for name in done.converted if name in widths}
        faults += converter.layout_faults(config, own, degrees)
    if faults:
        raise ConfigError(faults)


def emulated(config: JobConfig) -> JobConfig:
    """The config with the emulation of what needs other hardware than a CPU."""
    for converter in _used(config):
        config = converter.emulated(config)
    return config


def exact(config: JobConfig) -> JobConfig:
    """The config without converters that round."""
    used = zip(config.model.converters, _used(config), strict=True)
    names = [name for name, converter in used if not converter.rounds]
    return replace(config, model=replace(config.model, converters=names))


def unknown_converters(config: JobConfig) -> list[Fault]:
    """A fault for each name that nobody has registered, after custom imports."""
    known = [*_CONVERTERS, *ALIASES]
    return [_unknown(name, known) for name in config.model.converters if name not in known]


def unused_sections(config: JobConfig) -> list[str]:
    """A line for each section of [quantize] that asks for something while no converter reads it.

    Filters ask for nothing, and stand in files for the day that a converter is named.
    """
    used = {ALIASES.get(name, name) for name in config.model.converters}
    defaults, asked = leaf_keys(Quantize, "quantize."), {}
    for key, value in leaf_keys(config.quantize, "quantize.").items():
        section, _, name = key.rpartition(".")
        if value != defaults[key] and section not in used and name not in ("fqns", "filter_fqns"):
            asked.setdefault(section, key)
    return [
        f"{key} is without effect: {section} is not in model.converters, and nothing is quantized by it"
        for section, key in asked.items()
    ]


def _unknown(name: str, known: list[str]) -> Fault:
    fault = unknown_value("model.converters", name, known)
    return replace(fault, remedy=present_name(name, known) or fault.remedy)


def _used(config: JobConfig) -> list[Converter]:
    names = [ALIASES.get(name, name) for name in config.model.converters]
    if not _CONVERTERS.keys() >= set(names):  # forked ranks of the oracle have not imported it
        importlib.import_module(config.experimental.custom_import)
    return [_CONVERTERS[name] for name in names]


def _converts_nothing(done: Conversion) -> Fault:
    left = f": {done.left_in_words()}" if done.left else ", which has none"
    reason = f"leaves {done.name} none of the model's {done.kind} to convert{left}."
    return Fault(done.filter_key, reason, "Filter less, or take it out of model.converters.")
