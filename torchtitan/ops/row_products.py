"""Products in which a row's bits depend on its own values alone, and neither on other rows nor on its place.

In a plain product they depend on both, on CPUs and GPUs: libraries choose kernels, and share out work, by
shape. R rows, G groups, K and N widths.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from torchtitan.ops.wide import wide_dtype, widened

ALIGNED = 16
"""CPUs multiply blocks whose rows and columns are multiples of this."""

_ROWS = 64
"""Rows of a block of plain matrices: 1.4 times slower than one product in fp32, 16 are 2.5 times."""

_ON_GPU = (torch.float32, torch.bfloat16, torch.float16)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (R, K) times b (K, N), summed in fp32 at least."""
    if a.is_cuda:
        return grouped_product(a, b.unsqueeze(0), torch.full((1,), len(a), device=a.device))
    out = a.new_empty(len(a), b.shape[1])
    _multiply(a, b, range(len(a)), _ROWS, out)
    return out


def grouped_product(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(a (R, K), b (G, K, N), counts (G,) int64) -> (R, N): each row times its group's matrix.

    Counts may sum to less than R: what the rows after them get is undefined.
    """
    if a.is_cuda and a.dtype in _ON_GPU:
        from torchtitan.ops import triton_kernels  # PyTorch for CPUs comes without Triton

        return triton_kernels.grouped_product(a, b, counts)
    out = a.new_empty(len(a), b.shape[2])
    for group, rows in groups(counts):
        _multiply(a, b[group], range(rows.start, rows.stop), ALIGNED, out)
    return out


def groups(counts: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Groups that have rows, and where these are. Waits for the device."""
    start = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            yield group, slice(start, start + count)
        start += count


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, CPUs compute on one thread: shared out, what a row gets depends on its place."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _multiply(
    a: torch.Tensor, matrix: torch.Tensor, rows: range, size: int, out: torch.Tensor
) -> None:
    """These rows of a by a matrix into those of out: `size` at a time, the last block zero-filled."""
    matrix = _fill(matrix.to(wide_dtype(a)), ALIGNED)
    with one_thread():
        for start in rows[::size]:
            part = slice(start, min(start + size, rows.stop))
            block = _fill(widened(a[part]), size)
            out[part] = (block @ matrix)[: part.stop - part.start, : out.shape[1]]


def _fill(matrix: torch.Tensor, height: int) -> torch.Tensor:
    """A copy with zeros below and to the right, up to whole blocks."""
    return F.pad(matrix, (0, -matrix.shape[1] % ALIGNED, 0, -matrix.shape[0] % height))
