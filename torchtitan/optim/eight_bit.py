"""Moments in 8 bits, and how they go through a checkpoint: as values, so that nothing is lost.

torchao keeps a moment as a code for each value and a scale for each block of 256 values of a rank's
part (arXiv 2110.02861), so what a block is hangs on the layout. Checkpoints hold the values instead,
which fit any layout, and AdamW. Values that were decoded from codes are the same after they have been
quantized again, bit for bit, if blocks are the same: a resume on the same layout goes on as if it had
not stopped.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torchao.optim.subclass_8bit import OptimState8bit

BLOCK_SIZE = 256
LEAST_VALUES = 4096
"""Smaller tensors are not quantized; so it is in torchao, and in bitsandbytes before it."""
_LEAST_SCALE = 1e-12  # torchao's


def is_quantizable(local: torch.Tensor) -> bool:
    """Whether the moments of a rank's part of a parameter are kept in 8 bits."""
    return local.numel() >= LEAST_VALUES and local.numel() % BLOCK_SIZE == 0


def is_quantized(moment: torch.Tensor) -> bool:
    """Whether it is an OptimState8bit; torchao, slow to import, is not asked."""
    return hasattr(moment, "codes")


@torch.no_grad()
def quantize_(moment: "OptimState8bit", values: torch.Tensor) -> None:
    """Make a moment the nearest to `values` that it can be: equal, if they were a moment's."""
    blocks = values.to(moment.device, torch.float32).reshape(len(moment.scale), -1)
    moment.copy_(blocks.view(moment.shape))
    for scale in _scales_before(blocks, moment.qmap):
        codes = _nearest(blocks / scale, moment.qmap)
        same = (moment.qmap[codes.int()] * scale == blocks).all(1)
        moment.scale[same] = scale[same, 0]
        moment.codes.view_as(blocks)[same] = codes[same]


def _scales_before(blocks: torch.Tensor, qmap: torch.Tensor) -> list[torch.Tensor]:
    """The scales (num_blocks, 1) that blocks (num_blocks, block size) of decoded values may have had.

    One value of each block was as large as its scale. If positive, it is still, by the last code,
    which stands for 1. If negative, it has become the product of the scale and what the first code stands
    for, -0.993, and scales next to one another may have the same product.
    """
    least = torch.full_like(blocks[:, :1], _LEAST_SCALE)
    largest = blocks.amax(1, keepdim=True).clamp(min=_LEAST_SCALE)
    if qmap[0] == 0:
        return [least, largest]
    quotient = (blocks.amin(1, keepdim=True) / qmap[0]).clamp(min=_LEAST_SCALE)
    neighbours = [torch.nextafter(quotient, factor * quotient) for factor in (0.5, 2.0)]
    return [least, *neighbours, quotient, largest]


def _nearest(values: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(values, (qmap[1:] + qmap[:-1]) / 2).to(torch.uint8)
