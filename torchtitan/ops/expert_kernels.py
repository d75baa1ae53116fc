"""What experts are computed with: products of rows sorted by group, and the passes between them.

R rows, G groups, K and N widths; counts (G,) int64 says how many rows each group has. Their sum may
be below R: what `rows` gives for the rows after them is undefined, and `weights` leaves them out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from torchtitan.logging import logger
from torchtitan.ops.row_products import grouped_product, groups, one_thread
from torchtitan.ops.rows import take_rows
from torchtitan.ops.swiglu import Gating, swiglu, swiglu_backward
from torchtitan.ops.wide import wide_dtype

BACKENDS = ("auto", "fused", "unfused", "reference")

_VECTORS = 32
"""Rows that the reference gates at a time: with any width whole pairs of vectors, also AVX-512's.
What is left beyond these, PyTorch computes by itself, and rounds otherwise."""

_FUSED_BYTES = 24 * 2**20
"""Of an expert's gate and up weights, where nobody has measured: half of an H100's L2, beside the rows
that pass by."""


def clear_after(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Nothing has written these rows: they may hold NaN, which no multiplication removes."""
    after = torch.arange(len(x), device=x.device) >= counts.sum()
    return x.masked_fill_(after.view(-1, *[1] * (x.ndim - 1)), 0)


class Gathered(NamedTuple):
    """R rows that may not have been written yet: x[index]."""

    x: torch.Tensor
    """(T, K)"""
    index: torch.Tensor
    """(R,) of integers; -1 is a row of zeros."""


def gather(rows: Gathered | torch.Tensor) -> torch.Tensor:
    """(R, K)"""
    return take_rows(*rows) if isinstance(rows, Gathered) else rows


@dataclass(frozen=True)
class Kernels:
    """One implementation of all that experts are made of."""

    rows: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(a (R, K), b (G, K, N), counts) -> (R, N): each row times its group's matrix."""
    weights: Callable[..., torch.Tensor]
    """(a (R, K), b (R, N), counts) -> (G, K, N): a^T b over each group's rows; 0 without rows."""
    operand: Callable[[Gathered | torch.Tensor], Gathered | torch.Tensor] = gather
    """What the others take of such rows; `Gathered` only where there are `up` and `down_backward`."""
    up: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    """(a (R, D), w13 (e, 2, F, D), counts, scores, gating) -> z (R, 2F) and its `swiglu` (R, F), where
    one kernel computes both; no biases."""
    down_backward: Callable[..., tuple] | None = None
    """(d_y (R, D), w2 (e, D, F), counts, z, scores, gating) -> what `swiglu_backward` gives for the
    gradient d_y w2, where one kernel computes both."""
    swiglu: Callable = swiglu
    swiglu_backward: Callable = swiglu_backward
    clear_after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = clear_after
    """(x (R, ...), counts) -> x, zero in the rows of no group, in place."""
    exact: "Kernels | None" = None
    """Where `rows` or `weights` quantize: those that do not."""
    name: str = ""
    """What multiplies, in words for the log."""


def choose(
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    hidden: int,
    dim: int,
    fusible: bool = False,
) -> Kernels:
    """The kernels for `backend`, one of `BACKENDS`, and experts of these widths.

    All but "reference" are the grouped GEMM where this device has one for `dtype` and rows are multiples
    of 16 bytes, else a loop over groups, which waits for the counts to arrive on the host. `fusible` says
    that gathers (of rows that all exist) and gating may happen inside of products: with "fused" they do
    wherever they can, with "auto" while an expert's weights stay in L2, with "unfused" never.
    """
    if backend == "reference":
        in_triton = device.type == "cuda" and dtype != torch.float64  # which computes in fp32
        return _on_gpu(REFERENCE_ON_GPU) if in_triton else REFERENCE
    assert backend in BACKENDS, f"unknown backend {backend!r}"
    aligned = all(width * dtype.itemsize % 16 == 0 for width in (hidden, dim))
    if not aligned or not _has_grouped_mm(dtype, device):
        if device.type == "cuda":
            _warn_of_loop(dtype, (hidden, dim))
        return LOOP
    if device.type == "cpu":
        return GROUPED_MM
    wanted = backend == "fused" or (backend == "auto" and _in_cache(dtype, hidden, dim))
    fused = fusible and wanted and can_fuse(dtype, device, hidden, dim)
    return _fused() if fused else _on_gpu(GROUPED_MM)


@cache
def can_fuse(dtype: torch.dtype, device: torch.device, hidden: int, dim: int) -> bool:
    """Whether there are fused products for such experts: in bf16 on Hopper, for widths of whole tiles."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return hopper and dtype == torch.bfloat16 and hidden % 128 == dim % 128 == 0


def _in_cache(dtype: torch.dtype, hidden: int, dim: int) -> bool:
    return 2 * hidden * dim * dtype.itemsize <= _FUSED_BYTES


@cache
def _on_gpu(products: Kernels) -> Kernels:
    """With these products, and passes in Triton, which go row by row."""
    from torchtitan.ops import triton_kernels  # PyTorch for CPUs comes without Triton

    return replace(
        products,
        swiglu=triton_kernels.swiglu,
        swiglu_backward=triton_kernels.swiglu_backward,
        clear_after=triton_kernels.clear_after,
    )


@cache
def _fused() -> Kernels:
    from torchtitan.ops import triton_products as products

    def split(rows):
        x, index = rows if isinstance(rows, Gathered) else (rows, None)
        return x.contiguous(), index

    def weights(a, b, counts):
        if isinstance(a, Gathered):
            return products.weights(*split(a), b, counts)
        if isinstance(b, Gathered):
            return products.weights(*split(b), a, counts, transposed=True)
        return _grouped_mm_weights(a, b, counts)

    return replace(
        _on_gpu(GROUPED_MM),
        rows=products.rows,
        weights=weights,
        operand=lambda rows: rows,
        up=lambda a, *others: products.up(*split(a), *others),
        down_backward=lambda d_y, *others: products.down_backward(*split(d_y), *others),
        name="grouped GEMM with gathers and gating inside",
    )


@cache
def _has_grouped_mm(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tiny problem runs: documentation of supported types differs from what does."""
    a, b = (torch.ones(size, dtype=dtype, device=device) for size in [(16, 16), (2, 16, 16)])
    counts = torch.full((2,), 8, dtype=torch.int64, device=device)
    try:
        GROUPED_MM.weights(a, GROUPED_MM.rows(a, b, counts), counts)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@cache
def _warn_of_loop(dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    logger.warning(
        f"Experts of widths {widths} in {dtype} run as a loop over experts, slowly and with a "
        "device sync: no grouped GEMM takes them (it needs bfloat16 and rows of whole 16 bytes)"
    )


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(a, b, offs=counts.cumsum(0, dtype=torch.int32))


def _grouped_mm_weights(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    # The transpose stays a view: a contiguous copy would put group boundaries off 16 bytes.
    return _grouped_mm(a.t(), b, counts)


def _loop(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    out = a.new_empty(len(a), b.shape[2])
    for group, rows in groups(counts):
        torch.mm(a[rows], b[group], out=out[rows])
    return out


def _loop_weights(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    out = a.new_zeros(len(counts), a.shape[1], b.shape[1])
    for group, rows in groups(counts):
        torch.mm(a[rows].t(), b[rows], out=out[group])
    return out


def _reference_weights(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Row after row: a zero row anywhere among them changes no bit."""
    wide = wide_dtype(a)
    out = torch.zeros(len(counts), a.shape[1], b.shape[1], dtype=wide, device=a.device)
    for group, rows in groups(counts):
        for row in range(rows.start, rows.stop):
            out[group].addcmul_(a[row].to(wide).unsqueeze(1), b[row].to(wide))
    return out.to(a.dtype)


def _full_blocks(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """x (R, ...) in blocks of rows, the last one filled with zeros."""
    num_blocks = -(-len(x) // _VECTORS)
    filled = x.new_zeros(num_blocks * _VECTORS, *x.shape[1:])
    filled[: len(x)] = x
    return filled.split(_VECTORS)


def _reference_swiglu(
    z: torch.Tensor,
    scores: torch.Tensor | None,
    gating: Gating,
    num_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """In full blocks too, of whole vectors."""
    factors = z.new_ones(len(z)) if scores is None else scores
    blocks = zip(_full_blocks(z), _full_blocks(factors), strict=True)
    with one_thread():
        return torch.cat([swiglu(*block, gating) for block in blocks])[: len(z)]


def _reference_swiglu_backward(
    d_act: torch.Tensor,
    z: torch.Tensor,
    scores: torch.Tensor | None,
    gating: Gating,
    num_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    factors = z.new_ones(len(z)) if scores is None else scores
    blocks = zip(_full_blocks(d_act), _full_blocks(z), _full_blocks(factors), strict=True)
    with one_thread():
        results = zip(*[swiglu_backward(*block, gating) for block in blocks], strict=True)
    act, d_z, d_scores = (torch.cat(parts)[: len(z)] for parts in results)
    return act, d_z, None if scores is None else d_scores


GROUPED_MM = Kernels(_grouped_mm, _grouped_mm_weights, name="grouped GEMM")
LOOP = Kernels(_loop, _loop_weights, name="a loop over experts")
REFERENCE = Kernels(
    grouped_product,
    _reference_weights,
    swiglu=_reference_swiglu,
    swiglu_backward=_reference_swiglu_backward,
    name="the reference's blocks of rows",
)
REFERENCE_ON_GPU = Kernels(grouped_product, _loop_weights, name="the reference's blocks of rows")
