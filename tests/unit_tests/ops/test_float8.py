"""Numbers in float8 with their scales: how near they are, and what becomes of zeros, NaN and infinity."""

import pytest
import torch
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

from torchtitan.ops import float8, quantized_kernels
from torchtitan.ops.float8 import Quantized

COUNTS = torch.tensor([32, 0, 64, 32])


def numbers(*shape, dtype=torch.float32, seed=0):
    """Rows of very different sizes, the first of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.logspace(-20, 20, shape[0])[:, None]
    x[0] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_come_back_within_a_sixteenth_and_then_exactly(dtype):
    x = numbers(9, 48, dtype=dtype)
    quantized = float8.quantize(x, 1)
    back = float8.dequantize(quantized, dtype)
    assert quantized.scale.log2().frac().eq(0).all()  # powers of two
    assert ((back - x).abs() <= x.abs() / 16 + x.abs().amax(1, keepdim=True) * 2**-18).all()
    assert torch.equal(float8.dequantize(float8.quantize(back, 1), dtype), back)


def test_parts_are_rounded_as_the_whole_unless_they_are_far_smaller():
    """Why layouts agree that split what a scale covers; below 2^-13 of its largest they may not."""
    generator = torch.Generator().manual_seed(0)
    large = 1 + torch.rand(8, 32, generator=generator)
    small = 1 + torch.rand(8, 32, generator=generator)
    for exponent, alike in ((-6, True), (-13, True), (-18, False)):
        whole = torch.cat([large, small * 2.0**exponent], 1)
        both = [float8.dequantize(float8.quantize(part, 1), whole.dtype) for part in whole.chunk(2, 1)]
        together = float8.dequantize(float8.quantize(whole, 1), whole.dtype)
        assert torch.equal(torch.cat(both, 1), together) == alike


def test_a_row_of_zeros_has_a_finite_scale():
    data, scale = float8.quantize(torch.zeros(3, 16), 1)
    assert (data.float() == 0).all() and scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(value):
    x = torch.ones(2, 16)
    x[1, 5] = value
    back = float8.dequantize(float8.quantize(x, 1), torch.float32)
    assert (back[0] == 1).all() and not back[1, 5].isfinite()


def test_scales_are_torchaos_rounded_to_powers_of_two():
    x = numbers(9, 48).clamp(-1e20, 1e20)[1:]
    x = x[x.abs().amax(1) > 1e-11]  # torchao has none for smaller numbers
    theirs = tensor_to_scale(
        x, torch.float8_e4m3fn, scaling_granularity=ScalingGranularity.AXISWISE,
        axiswise_dim=1, round_scales_to_power_of_2=True,
    )  # fmt: skip
    data, scale = float8.quantize(x, 1)
    assert torch.equal(scale, theirs.reciprocal())
    assert torch.equal(data.float(), to_fp8_saturated(x * theirs, torch.float8_e4m3fn).float())


def test_columns_of_each_group_have_scales_of_their_own():
    x = torch.cat([numbers(128, 48).clamp(-1e9, 1e9), torch.full((16, 48), float("nan"))])
    data, scale = float8.quantize_group_columns(x, COUNTS)
    back = float8.dequantize_group_columns(Quantized(data, scale), COUNTS, x.dtype)
    assert scale.shape == (4, 48) and scale.isfinite().all()
    for group, rows in enumerate([slice(0, 32), slice(0, 0), slice(32, 96), slice(96, 128)]):
        if rows.stop > rows.start:
            alone = float8.quantize(x[rows], 0)
            assert torch.equal(alone.scale[0], scale[group])
            assert torch.equal(float8.dequantize(alone, x.dtype), back[rows])


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (5, 48)])
def test_rows_of_any_number_are_quantized(shape):
    data, scale = float8.quantize_rows(torch.randn(shape))
    assert data.shape == shape and data.is_contiguous() and scale.shape == (shape[0], 1)
    torch.library.opcheck(float8.quantize_rows, (torch.randn(shape),))


@pytest.mark.parametrize("column_major", [True, False])
def test_mx_is_emulated_as_torchao_does(column_major):
    """The very products that MX hardware would be given, in torchao's own emulation."""
    a, g = (numbers(128, n, dtype=torch.bfloat16).clamp(-1e3, 1e3) for n in (64, 96))
    b = torch.randn(4, 96, 64).mT if column_major else torch.randn(4, 64, 96)
    b = b.bfloat16()
    kernels = quantized_kernels.choose("emulated_mxfp8", torch.bfloat16, a.device, 64, 96)
    theirs = quantized_kernels._mx_rows(a, b, COUNTS, emulate=True)
    assert torch.equal(kernels.rows(a, b, COUNTS), theirs)
    theirs = quantized_kernels._mx_weights(a, g, COUNTS, emulate=True)
    assert torch.equal(kernels.weights(a, g, COUNTS), theirs)
