"""What one row is on its way to an expert where it travels as float8: numbers, their scale, a score.

N rows sent, R rows received, D model.
"""

import torch

from torchtitan.ops.float8 import Quantized, dequantize, quantize_rows

_TAIL_BYTES = 16
"""Behind the numbers: scale and score of 4 bytes each, the rest keeps rows aligned for wide loads."""


def pack(
    x: torch.Tensor,
    of_rows: torch.Tensor,
    scores: torch.Tensor | None = None,
    of_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """x[of_rows] in float8, and beside each scores[of_scores] fp32 or none: (N, D + 16) bytes."""
    width = x.shape[1]
    data, scale = quantize_rows(x)
    packed = torch.empty(len(of_rows), width + _TAIL_BYTES, dtype=torch.uint8, device=x.device)
    torch.index_select(data.view(torch.uint8), 0, of_rows, out=packed[:, :width])
    tail = packed[:, width:].view(torch.float32)
    tail[:, 0] = scale.squeeze(1).index_select(0, of_rows)
    if scores is not None:
        tail[:, 1] = scores.index_select(0, of_scores)
    return packed


def unpack(packed: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (R, D) in `dtype` and scores (R,) fp32 from messages (R, D + 16); zeros from zeros."""
    data, tail = packed[:, :-_TAIL_BYTES], packed[:, -_TAIL_BYTES:].view(torch.float32)
    rows = dequantize(Quantized(data.view(torch.float8_e4m3fn), tail[:, :1]), dtype)
    return rows, tail[:, 1].contiguous()
