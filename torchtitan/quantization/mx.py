"""Linear layers that multiply in MX formats, by torchao: `quantize.linear.mx`.

Numbers are float8 (e4m3) in blocks of 32 along the dimension that a product sums over, each block with
a scale that is a power of two (OCP Microscaling Formats 1.0).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.names import did_you_mean
from torchtitan.config.nested import with_value
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.mesh import Degrees
from torchtitan.quantization.conversion import Conversion
from torchtitan.quantization.hardware import hardware_faults, precision_faults
from torchtitan.quantization.library import torchao
from torchtitan.quantization.linear import HIGH_PRECISION, Widths, choose_layers, split_faults

NAME = "quantize.linear.mx"
FILTER = f"{NAME}.filter_fqns"
BLOCK = 32


@dataclass(frozen=True)
class Recipe:
    """How products are made."""

    scaling: str
    """How a block's scale is rounded to a power of two: torchao's ScaleCalculationMode."""
    emulated: bool = False
    """In high precision, of numbers rounded to MX: on any device."""
    exact_weight_gradient: bool = False
    """Weights' gradients are products in high precision."""


RECIPES = {
    "mxfp8_cublas": Recipe("floor"),  # upstream's names
    "mxfp8_cublas_rceil": Recipe("rceil"),
    "mxfp8_emulated": Recipe("floor", emulated=True),
    "mxfp8_rceil": Recipe("rceil"),  # those of torchao 0.18
    "mxfp8_rceil_wgrad_with_hp": Recipe("rceil", exact_weight_gradient=True),
    "mxfp8_emulated_rceil": Recipe("rceil", emulated=True),
}


class MXLinear(nn.Linear):
    """A Linear layer whose three products take MX operands."""

    product: Any
    """torchao's differentiable product of an input and a weight."""
    options: tuple
    """Its further arguments."""

    @classmethod
    def of(cls, layer: nn.Linear, product: Any, options: tuple) -> "MXLinear":
        """With the weights of a layer on the meta device."""
        with torch.device("meta"):
            new = cls(layer.in_features, layer.out_features, bias=False)
        new.weight, new.bias = layer.weight, layer.bias
        new.product, new.options = product, options
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        split = isinstance(self.weight, DTensor)
        y = self._multiply_split(x, self.weight) if split else self._multiply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        # A weight's gradient sums over rows, in whole blocks; rows of zeros add nothing.
        padding = -len(rows) % BLOCK
        padded = F.pad(rows, (0, 0, 0, padding)) if padding else rows
        y = self.product(padded, weight, *self.options)[: len(rows)]
        return y.unflatten(0, x.shape[:-1])

    def _multiply_split(self, x: DTensor, weight: DTensor) -> DTensor:
        """Each rank's part, as blocks lie within it: DTensor would gather operands to find their scales."""
        [placement] = weight.placements
        last = Shard(x.ndim - 1)
        by_rows = placement == Shard(0)
        of_grad, of_output = (Partial(), last) if by_rows else (last, Partial())
        y = self._multiply(x.to_local(grad_placements=[of_grad]), weight.to_local())
        return DTensor.from_local(y, weight.device_mesh, [of_output], run_check=False)


def convert(model: nn.Module, config: JobConfig) -> Conversion:
    """Exchange Linear layers as quantize.linear.mx says, in place."""
    if faults := list(_recipe_faults(config)):
        raise ConfigError(faults)
    options = config.quantize.linear.mx
    converted, left = choose_layers(
        model, options.filter_fqns, _too_odd, lambda head: HIGH_PRECISION, FILTER
    )
    product = torchao("prototype.moe_training.mxfp8_linear").mx_mm.apply
    further = _product_options(RECIPES[options.recipe_name], options.mxfp8_dim1_cast_kernel_choice)
    for name in converted:
        parent, _, own = name.rpartition(".")
        layer = MXLinear.of(model.get_submodule(name), product, further)
        setattr(model.get_submodule(parent), own, layer)
    return Conversion(NAME, converted, left, "Linear layers", options.recipe_name, FILTER)


def _product_options(recipe: Recipe, cast_kernel: str) -> tuple:
    """What torchao's product takes beside its operands; checked on 0.18."""
    formats = torchao("prototype.mx_formats.config")
    kernels = torchao("quantization.quantize_.common").KernelPreference
    numbers = torch.float8_e4m3fn
    return (
        numbers,
        numbers,
        numbers,
        BLOCK,
        kernels.EMULATED if recipe.emulated else kernels.AUTO,
        formats.MXFP8Dim0CastKernelChoice.TRITON,
        formats.MXFP8Dim1CastKernelChoice(cast_kernel),
        formats.ScaleCalculationMode(recipe.scaling),
        recipe.exact_weight_gradient,
    )


def _too_odd(layer: nn.Linear) -> str:
    return f"widths must divide by {BLOCK}" if any(n % BLOCK for n in layer.weight.shape) else ""


def _recipe_faults(config: JobConfig) -> Iterator[Fault]:
    """A fault where the recipe is none of those there are."""
    name = config.quantize.linear.mx.recipe_name
    if name not in RECIPES:
        remedy = f"{did_you_mean(name, RECIPES)} Known: {', '.join(RECIPES)}.".lstrip()
        yield Fault(f"{NAME}.recipe_name", "no such recipe.", remedy, name)


def device_faults(config: JobConfig, device: torch.device) -> Iterator[Fault]:
    """Faults where the device has no MX products and they are not emulated."""
    options, key = config.quantize.linear.mx, f"{NAME}.recipe_name"
    yield from _recipe_faults(config)
    if options.recipe_name not in RECIPES or RECIPES[options.recipe_name].emulated:
        return
    remedy = 'Use "mxfp8_emulated_rceil" to try a config out, slowly.'
    yield from hardware_faults(device, (10, 0), "MX products", key, options.recipe_name, remedy)
    yield from precision_faults(config, NAME)


def layout_faults(config: JobConfig, widths: Widths, degrees: Degrees) -> Iterator[Fault]:
    """A fault where tensor parallelism splits layers to less than whole blocks."""
    yield from split_faults(NAME, widths, BLOCK, degrees.tp)


def emulated(config: JobConfig) -> JobConfig:
    """The config with emulated products."""
    recipe = RECIPES[config.quantize.linear.mx.recipe_name]
    name = "mxfp8_emulated" if recipe.scaling == "floor" else "mxfp8_emulated_rceil"
    return with_value(config, f"{NAME}.recipe_name", name)
