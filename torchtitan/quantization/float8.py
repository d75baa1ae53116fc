"""Linear layers that multiply in float8, by torchao: `quantize.linear.float8`."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from torchtitan.config.faults import Fault
from torchtitan.config.schema import JobConfig
from torchtitan.quantization.conversion import Conversion
from torchtitan.quantization.linear import choose

NAME = "quantize.linear.float8"
TENSORWISE = "tensorwise"
MULTIPLE = 16
"""Of which float8 products need their widths."""


def convert(model: nn.Module, config: JobConfig) -> Conversion:
    """Exchange Linear layers for those of torchao, as quantize.linear.float8 says, in place."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    options = config.quantize.linear.float8
    recipe = options.recipe_name or TENSORWISE
    converted, left = choose(model, options.filter_fqns, _too_odd)
    settings = replace(
        Float8LinearConfig.from_recipe_name(recipe),
        emulate=options.emulate,
        enable_fsdp_float8_all_gather=options.enable_fsdp_float8_all_gather,
    )
    convert_to_float8_training(model, config=settings, module_filter_fn=lambda _, name: name in converted)
    return Conversion(NAME, converted, left, "Linear layers", recipe, f"{NAME}.filter_fqns")


def device_faults(config: JobConfig, device: torch.device) -> Iterator[Fault]:
    """A fault where the device has no float8 products and they are not emulated."""
    if config.quantize.linear.float8.emulate:
        return
    if device.type != "cuda":
        reason = "float8 products need a GPU, and this machine trains on its CPU."
    elif (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        has = ".".join(map(str, capability))
        reason = f"float8 products need compute capability 8.9, and this GPU has {has}."
    else:
        return
    yield Fault(f"{NAME}.emulate", reason, "Set it to true to try a config out, slowly.", False)


def emulated(config: JobConfig) -> JobConfig:
    """The config with emulated products."""
    linear = replace(config.quantize.linear, float8=replace(config.quantize.linear.float8, emulate=True))
    return replace(config, quantize=replace(config.quantize, linear=linear))


def _too_odd(layer: nn.Linear) -> str:
    widths = (layer.in_features, layer.out_features)
    return "" if not any(n % MULTIPLE for n in widths) else f"widths must divide by {MULTIPLE}"
