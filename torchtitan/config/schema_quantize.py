"""Which keys say how matrix products are quantized? One section per kind of layer and of number."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Float8Linear:
    """float8 products in Linear layers."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather sharded weights as float8; for the tensorwise recipe, and weights that shard evenly."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all weights with one all-reduce after each optimizer step."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """torchao's recipe of scaling; None is tensorwise."""

    filter_fqns: list[str] = field(default_factory=list)
    """Linear layers left alone: those whose name contains one of these, and with
    "auto_filter_small_kn" those too small to gain. Routers always are; "output" is the head."""

    emulate: bool = False
    """Emulate float8 on devices without it, to test; not with compile."""


@dataclass(frozen=True)
class MXLinear:
    """MX-format products in Linear layers."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Kernel that casts along columns."""

    recipe_name: str = "mxfp8_cublas"
    """mxfp8_cublas, mxfp8_cublas_rceil, mxfp8_rceil, mxfp8_rceil_wgrad_with_hp; on any device
    mxfp8_emulated, mxfp8_emulated_rceil."""

    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Linear layers left alone: those whose name contains one of these."""


@dataclass(frozen=True)
class Float8GroupedMM:
    """float8 products in grouped experts."""

    fqns: list[str] | str = field(default_factory=list)
    """Modules whose experts are quantized: those whose name contains one of these."""

    recipe_name: Literal["rowwise", "rowwise_with_gw_hp"] = "rowwise"
    """Ours. One scale for each row and column; with_gw_hp leaves weight gradients in high precision."""

    exchange_in_float8: bool = False
    """Ours. Send rows to the experts of other ranks, and gradients of what these return, as float8."""

    emulate: bool = False
    """Ours. Emulate float8 on devices without it, to test."""


@dataclass(frozen=True)
class MXGroupedMM:
    """MX-format products in grouped experts."""

    recipe_name: Literal["mxfp8", "mxfp8_emulated"] = "mxfp8"
    """torchao's recipe of MX grouped products, or (ours) its emulation on devices without them."""

    fqns: list[str] | str = field(default_factory=list)
    """Modules whose experts are quantized: those whose name contains one of these."""


@dataclass(frozen=True)
class QuantizeLinear:
    """Quantization of Linear layers."""

    float8: Float8Linear = field(default_factory=Float8Linear)
    """float8, by torchao."""

    mx: MXLinear = field(default_factory=MXLinear)
    """MX formats, by torchao."""


@dataclass(frozen=True)
class QuantizeGroupedMM:
    """Quantization of the experts' grouped matrix products."""

    float8: Float8GroupedMM = field(default_factory=Float8GroupedMM)
    """float8, by PyTorch's scaled grouped products."""

    mx: MXGroupedMM = field(default_factory=MXGroupedMM)
    """MX formats, by torchao."""


@dataclass(frozen=True)
class Quantize:
    """Low-precision matrix products."""

    linear: QuantizeLinear = field(default_factory=QuantizeLinear)
    """Linear layers."""

    grouped_mm: QuantizeGroupedMM = field(default_factory=QuantizeGroupedMM)
    """Grouped experts."""
