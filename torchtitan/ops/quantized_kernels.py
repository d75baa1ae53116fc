"""The experts' products in low precision: by the device's own, or emulated anywhere.

R rows sorted by group, G groups, K and N widths, counts (G,) int64: as in ops/expert_kernels.py.
Emulation rounds to the same numbers and multiplies these in the tensors' own dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.ops import expert_kernels, float8
from torchtitan.ops.expert_kernels import Kernels

EMULATED = "emulated_"
"""Before the name of a recipe: computed without hardware for it."""

_MX_BLOCK = 32  # OCP Microscaling Formats 1.0


@dataclass(frozen=True)
class Recipe:
    """Which products are quantized, how, and what that asks of rows and widths."""

    alignment: int
    """Widths, and the rows of each group, are multiples of this."""
    rounded: Callable[[Tensor], Tensor]
    """A factor of `Kernels.rows` as it is after quantization: products add up over its dim 1."""
    rounded_columns: Callable[[Tensor, Tensor], Tensor] | None
    """A factor of `Kernels.weights` with counts, or None: those products are not quantized."""
    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    """`Kernels.rows` on a device that has it, in bfloat16."""
    weights: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    """`Kernels.weights` there."""


def recipe_of(backend: str) -> Recipe | None:
    """The recipe of an experts' backend, emulated or not; None if it quantizes nothing."""
    return RECIPES.get(backend.removeprefix(EMULATED))


def row_alignment(backend: str) -> int:
    """What the number of rows of each expert must be a multiple of."""
    recipe = recipe_of(backend)
    return 1 if recipe is None else recipe.alignment


def choose(
    backend: str, dtype: torch.dtype, device: torch.device, *widths: int, fusible: bool = False
) -> Kernels:
    """The kernels of a backend: those of `expert_kernels.choose`, a recipe, or an emulated one."""
    recipe = recipe_of(backend)
    if recipe is None:
        return expert_kernels.choose(backend, dtype, device, *widths, fusible=fusible)
    exact = expert_kernels.choose("auto", dtype, device, *widths)
    if backend.startswith(EMULATED):
        return replace(emulated(recipe, exact), name=backend)
    assert device.type == "cuda" and dtype == torch.bfloat16, f"{backend}: {dtype} on {device}"
    weights = recipe.weights or exact.weights
    return replace(exact, rows=recipe.rows, weights=weights, exact=exact, name=backend)


@cache
def emulated(recipe: Recipe, exact: Kernels) -> Kernels:
    """`exact` multiplies what the recipe would."""

    def rows(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        return exact.rows(recipe.rounded(a), recipe.rounded(b), counts)

    def weights(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        a, b = (recipe.rounded_columns(x, counts) for x in (a, b))
        return exact.weights(a, b, counts)

    return replace(
        exact, rows=rows, weights=weights if recipe.rounded_columns else exact.weights, exact=exact
    )


def _rounded(x: Tensor) -> Tensor:
    return float8.dequantize(float8.quantize(x, 1), x.dtype)


def _rounded_columns(x: Tensor, counts: Tensor) -> Tensor:
    quantized = float8.quantize_group_columns(x, counts)
    return float8.dequantize_group_columns(quantized, counts, x.dtype)


def _rows(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    from torchtitan.ops import float8_triton  # PyTorch for CPUs comes without Triton

    a, b = float8_triton.quantize_rows(a), float8_triton.quantize_matrices(b)
    return float8_product(a.data, a.scale.squeeze(1), b.data, b.scale, counts)


def _weights(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    from torchtitan.ops import float8_triton

    a, b = (float8_triton.quantize_group_columns(x, counts) for x in (a, b))
    return float8_product(a.data.t(), a.scale.flatten(), b.data, b.scale.flatten(), counts)


def float8_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor
) -> Tensor:
    """In bfloat16. Hopper adds float8 products up in fewer bits than fp32, at twice the speed."""
    by_row = F.ScalingType.RowWise
    ends = counts.cumsum(0, dtype=torch.int32)
    return F.scaled_grouped_mm(
        a, b, a_scale, by_row, b_scale, by_row, offs=ends, output_dtype=torch.bfloat16, use_fast_accum=True
    )


def _rounded_blocks(x: Tensor) -> Tensor:
    blocks = float8.quantize(x.unflatten(1, (-1, _MX_BLOCK)), 2)
    return float8.dequantize(blocks, x.dtype).flatten(1, 2)


def _rounded_block_columns(x: Tensor, counts: Tensor) -> Tensor:
    return _rounded_blocks(x.t()).t()


def _mx_rows(a: Tensor, b: Tensor, counts: Tensor, emulate: bool = False) -> Tensor:
    from torchao.prototype.moe_training import mxfp8_grouped_mm  # no public names in 0.18

    if b.mT.is_contiguous():
        return mxfp8_grouped_mm._compute_fwd(a, b, *_mx_options(counts, emulate))
    return mxfp8_grouped_mm._compute_dgrad(a, b.mT, *_mx_options(counts, emulate))


def _mx_weights(a: Tensor, b: Tensor, counts: Tensor, emulate: bool = False) -> Tensor:
    from torchao.prototype.moe_training import mxfp8_grouped_mm

    ends, block, dtype, mode, preference = _mx_options(counts, emulate)
    options = (ends, block, dtype, mode, False, preference)
    return mxfp8_grouped_mm._compute_wgrad(a, b, *options).mT


def _mx_options(counts: Tensor, emulate: bool) -> tuple:
    """What torchao's products take beside their factors."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.quantization.quantize_.common import KernelPreference

    preference = KernelPreference.EMULATED if emulate else KernelPreference.AUTO
    ends = counts.cumsum(0, dtype=torch.int32)
    return ends, _MX_BLOCK, torch.bfloat16, ScaleCalculationMode.RCEIL, preference


RECIPES = {
    "float8_rowwise": Recipe(16, _rounded, _rounded_columns, _rows, _weights),
    "float8_rowwise_with_gw_hp": Recipe(16, _rounded, None, _rows, None),
    "mxfp8": Recipe(_MX_BLOCK, _rounded_blocks, _rounded_block_columns, _mx_rows, _mx_weights),
}
"""By backend. Numbers are e4m3. float8 has a scale a row of the left factor and a column of the right
one, and with_gw_hp leaves the products that make weight gradients in high precision; mxfp8 has a scale
for each 32 numbers of either."""
