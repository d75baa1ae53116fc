"""Grouped experts that multiply in MX formats, by torchao: `quantize.grouped_mm.mx`."""

from collections.abc import Iterator

import torch
from torch import nn

from torchtitan.config.faults import Fault
from torchtitan.config.nested import with_value
from torchtitan.config.schema import JobConfig
from torchtitan.quantization.conversion import Conversion
from torchtitan.quantization.experts import PRODUCTS, convert_experts
from torchtitan.quantization.hardware import hardware_faults, precision_faults
from torchtitan.quantization.library import torchao

NAME = "quantize.grouped_mm.mx"
CAPABILITY = (10, 0)
EMULATED = "mxfp8_emulated"


def convert(model: nn.Module, config: JobConfig) -> Conversion:
    """Let the experts of MoE layers multiply as quantize.grouped_mm.mx says, in place."""
    options = config.quantize.grouped_mm.mx
    emulate = options.recipe_name == EMULATED
    if not emulate:
        torchao("prototype.moe_training")  # it is there, and has said what it says
    return convert_experts(model, config, NAME, options.fqns, "mxfp8", emulate)


def device_faults(config: JobConfig, device: torch.device) -> Iterator[Fault]:
    """Faults where the device has no such products and they are not emulated."""
    recipe = config.quantize.grouped_mm.mx.recipe_name
    if recipe != EMULATED:
        remedy = f'Use "{EMULATED}" to try a config out, slowly.'
        yield from hardware_faults(device, CAPABILITY, PRODUCTS, f"{NAME}.recipe_name", recipe, remedy)
        yield from precision_faults(config, NAME)


def emulated(config: JobConfig) -> JobConfig:
    """The config with emulated products."""
    return with_value(config, f"{NAME}.recipe_name", EMULATED)
