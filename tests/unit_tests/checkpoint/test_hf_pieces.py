"""Any part of a tensor can be read, however its axes lie in the file."""

from itertools import combinations, product

import pytest
import torch
from safetensors.torch import save_file

from torchtitan.checkpoint.hf_files import BlockScales, TensorFiles
from torchtitan.checkpoint.hf_pieces import Piece

SIZES = (2, 2, 3, 5)
AXES = {
    "e d (f p) -> e p f d": lambda t: t.unflatten(2, (3, 2)).permute(0, 3, 2, 1),
    "e (p f) d -> e p f d": lambda t: t.unflatten(1, (2, 3)),
    "(e p f) d -> e p f d": lambda t: t.unflatten(0, (2, 2, 3)),
    "d f p e -> e p f d": lambda t: t.permute(3, 2, 1, 0),
}


def boxes(sizes):
    """Every box in a tensor of these sizes, as (offsets, lengths)."""
    ranges = [list(combinations(range(size + 1), 2)) for size in sizes]
    for bounds in product(*ranges):
        yield [first for first, _ in bounds], [last - first for first, last in bounds]


def cut(tensor, offsets, lengths):
    return tensor[tuple(slice(o, o + n) for o, n in zip(offsets, lengths))]


@pytest.mark.parametrize("axes", AXES)
def test_axes_are_split_and_transposed(axes):
    piece = Piece("theirs", "ours", (0,) * 4, SIZES, 0, axes)
    theirs = torch.arange(60).view(piece.shape)
    ours = AXES[axes](theirs)
    assert ours.shape == SIZES
    assert torch.equal(piece.write(ours), theirs)
    for offsets, lengths in boxes(SIZES):
        part = piece.read(theirs.__getitem__, offsets, lengths)
        assert torch.equal(part, cut(ours, offsets, lengths)), (offsets, lengths)


def test_one_expert_of_a_stack():
    piece = Piece("theirs", "ours", (3, 1, 0, 0), (1, 1, 3, 5), 2, None)
    theirs = torch.arange(15).view(piece.shape)
    assert torch.equal(piece.write(theirs.view(piece.sizes)), theirs)
    part = piece.read(theirs.__getitem__, [0, 0, 1, 2], [1, 1, 2, 3])
    assert torch.equal(part, theirs[None, None, 1:3, 2:5])


def test_any_part_is_dequantized_by_its_own_blocks(tmp_path):
    weight = torch.randn(7, 9).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3)
    tensors = {"w": weight, "w_scale_inv": scales, "other": torch.ones(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    files, blocks = TensorFiles(tmp_path), BlockScales(3, 4)
    assert blocks.shape((7, 9)) == (3, 3)
    whole = scales.repeat_interleave(3, 0)[:7].repeat_interleave(4, 1)[:, :9] * weight.float()
    read = blocks.source(files, "w")
    for offsets, lengths in boxes((7, 9)):
        part = tuple(slice(o, o + n) for o, n in zip(offsets, lengths))
        assert torch.equal(read(part), cut(whole, offsets, lengths)), (offsets, lengths)
    assert torch.equal(blocks.source(files, "other")((slice(0, 7),)), torch.ones(7))
