"""Grouped experts that multiply in float8, on PyTorch's products: `quantize.grouped_mm.float8`."""

from collections.abc import Iterator

import torch
from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.nested import with_value
from torchtitan.config.schema import JobConfig
from torchtitan.quantization.conversion import Conversion
from torchtitan.quantization.experts import PRODUCTS, convert_experts
from torchtitan.quantization.hardware import hardware_faults, precision_faults

NAME = "quantize.grouped_mm.float8"
CAPABILITY = (9, 0)
"""Of PyTorch's float8 products of groups."""


def convert(model: nn.Module, config: JobConfig) -> Conversion:
    """Let the experts of MoE layers multiply as quantize.grouped_mm.float8 says, in place."""
    options = config.quantize.grouped_mm.float8
    if options.exchange_in_float8 and config.parallelism.expert_parallel_degree == 1:
        reason = "no rows travel between ranks: parallelism.expert_parallel_degree = 1."
        raise ConfigError([Fault(f"{NAME}.exchange_in_float8", reason, "Set it to false.", True)])
    return convert_experts(
        model,
        config,
        NAME,
        options.fqns,
        f"float8_{options.recipe_name}",
        options.emulate,
        exchange_in_float8=options.exchange_in_float8,
    )


def device_faults(config: JobConfig, device: torch.device) -> Iterator[Fault]:
    """Faults where the device has no such products and they are not emulated."""
    if not config.quantize.grouped_mm.float8.emulate:
        remedy = "Set it to true to try a config out, slowly."
        yield from hardware_faults(device, CAPABILITY, PRODUCTS, f"{NAME}.emulate", False, remedy)
        yield from precision_faults(config, NAME)


def emulated(config: JobConfig) -> JobConfig:
    """The config with emulated products."""
    return with_value(config, f"{NAME}.emulate", True)
