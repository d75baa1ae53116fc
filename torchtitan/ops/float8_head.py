"""The output head's three products in float8: how each matrix is rounded, by recipe.

R rows and C columns. Recipes are those of torchao's Linear layers, but for scales: here all are powers
of two. A number's rounding then does not depend on which tokens are in a chunk or on a rank, unless the
number is far smaller than what shares its scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.ops.cross_entropy import Products, Sides, cross_entropy_, multiply
from torchtitan.ops.float8 import (
    Quantized,
    dequantize,
    has_float8_numbers,
    inverse_scale,
    quantize_sides,
)

MULTIPLE = 16
"""Of which float8 products need the dims that they sum over, and their output its columns."""

Scaling = Callable[[Tensor, int], Tensor]
"""What to multiply a matrix by before rounding, fp32, given the dim that its product sums over.

(R, 1), (1, C) or (1, 1)."""


def by_row(x: Tensor, dim: int) -> Tensor:
    """One for all that a product adds up."""
    return inverse_scale(torch.linalg.vector_norm(x, torch.inf, dim, keepdim=True))


def by_tensor(x: Tensor, dim: int) -> Tensor:
    """One for all."""
    return inverse_scale(torch.linalg.vector_norm(x, torch.inf)).view(1, 1)


GRADIENT_SCALE = 2.0**15
"""For logits' gradient in e5m2: one that needs no pass, for none of its numbers is beyond 1.

It brings 1 to the largest power of two of e5m2, which ends at 57344. Probabilities keep their two bits
down to 2^-29 and become zero below 2^-32: of 2^17 tokens a mass of 2^-15 is lost at most.
"""


def of_gradient(x: Tensor, dim: int) -> Tensor:
    """GRADIENT_SCALE."""
    return x.new_full((1, 1), GRADIENT_SCALE, dtype=torch.float32)


@dataclass(frozen=True)
class Rounding:
    """How a matrix becomes float8 where its columns are summed over (its rows are kept) and vice versa."""

    rows: Scaling
    columns: Scaling | None
    """None: this product is made in high precision."""
    dtype: torch.dtype = torch.float8_e4m3fn

    def __call__(self, x: Tensor, needs_columns: bool) -> Sides:
        """Sides of `Quantized`, or a plain one in high precision."""
        by_rows, by_columns = self.rows(x, 1), None
        if needs_columns and self.columns is not None:
            shared = self.rows is self.columns and by_rows.numel() == 1
            by_columns = by_rows if shared else self.columns(x, 0)
        rows, columns = quantize_sides(x, by_rows, by_columns, self.dtype)
        of_columns = x.t() if columns is None else Quantized(columns, by_columns.reciprocal().t())
        return Sides(Quantized(rows, by_rows.reciprocal()), of_columns)

    def emulated(self, x: Tensor, needs_columns: bool) -> Sides:
        """Sides of the rounded numbers in x's dtype."""
        return Sides(*(_plain(side, x.dtype) for side in self(x, needs_columns)))


@dataclass(frozen=True)
class Recipe:
    """How a head's matrices are rounded."""

    hidden: Rounding
    weight: Rounding
    gradient: Rounding


_ROWS = Rounding(by_row, by_row)
_TENSOR = Rounding(by_tensor, by_tensor)
_ROWS_ONLY = Rounding(by_row, None)
RECIPES = {
    "tensorwise": Recipe(_TENSOR, _TENSOR, Rounding(of_gradient, of_gradient, torch.float8_e5m2)),
    # Beside the 1 of a label e4m3 knows no probabilities below 2^-18, as in torchao's recipe.
    "rowwise": Recipe(_ROWS, _ROWS, _ROWS),
    "rowwise_with_gw_hp": Recipe(_ROWS_ONLY, Rounding(by_row, by_tensor), _ROWS_ONLY),
}


def products(recipe: str, emulate: bool) -> Products:
    """Those of a recipe; emulated ones are products of the rounded numbers in the compute dtype."""
    rounding = RECIPES[recipe]
    hidden, weight, gradient = rounding.hidden, rounding.weight, rounding.gradient
    if emulate:
        loss = partial(_loss, gradient.emulated)
        return Products(hidden.emulated, weight.emulated, loss, multiply, multiply, MULTIPLE)
    loss = _loss_in_one_pass if gradient.rows is of_gradient else partial(_loss, gradient)
    # Hopper's fast sums have too few bits for those over all tokens or the whole vocabulary.
    return Products(
        hidden, weight, loss, partial(_multiply, fast=True), partial(_multiply, fast=False), MULTIPLE
    )


def _loss(
    sides: Callable[[Tensor, bool], Sides], logits: Tensor, labels: Tensor, needs_gradient: bool
) -> tuple[Tensor, Sides | None]:
    losses = cross_entropy_(logits, labels)
    return losses, sides(logits, True) if needs_gradient else None


def _loss_in_one_pass(
    logits: Tensor, labels: Tensor, needs_gradient: bool
) -> tuple[Tensor, Sides | None]:
    """By tensorwise's recipe: on GPUs the gradient is written as float8 at once."""
    if not needs_gradient or not has_float8_numbers(logits.device):
        return _loss(RECIPES["tensorwise"].gradient, logits, labels, needs_gradient)
    from torchtitan.ops import triton_loss  # PyTorch for CPUs comes without Triton

    losses, *sides = triton_loss.scaled_cross_entropy(logits, labels, GRADIENT_SCALE, torch.float8_e5m2)
    scale = logits.new_full((1, 1), 1 / GRADIENT_SCALE, dtype=torch.float32)
    return losses, Sides(*(Quantized(data, scale) for data in sides))


def _plain(side: Quantized | Tensor, dtype: torch.dtype) -> Tensor:
    return side if isinstance(side, Tensor) else dequantize(side, dtype)


def _multiply(a: Quantized | Tensor, b: Quantized | Tensor, fast: bool) -> Tensor:
    """a (M, K), b (N, K) -> a @ b.T in bfloat16; of plain tensors in their own dtype."""
    if isinstance(a, Tensor):
        return multiply(a, b)
    one = a.scale.numel() == b.scale.numel() == 1
    if one or fast:
        kind = F.ScalingType.TensorWise if one else F.ScalingType.RowWise
        return _scaled_mm(a.data, b.data.t(), a.scale, b.scale.t(), kind, fast)
    # Kernels with a scale a row are slow where sums are exact. Powers of two can wait.
    unit = a.scale.new_ones(1, 1)
    out = _scaled_mm(a.data, b.data.t(), unit, unit, F.ScalingType.TensorWise, fast)
    return out.mul_(a.scale).mul_(b.scale.t())


def _scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, kind, fast: bool) -> Tensor:
    return F.scaled_mm(
        a, b, a_scale, kind, b_scale.contiguous(), kind, output_dtype=torch.bfloat16, use_fast_accum=fast
    )
