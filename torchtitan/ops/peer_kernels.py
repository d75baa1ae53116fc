"""Triton kernels that copy rows between GPUs of one host; what each does is ops/peer_rows.py's to say.

A program serves one token of one rank: it moves the token's rows between here and that rank.
"""

import torch
import triton
import triton.language as tl

from torchtitan.ops.peer_rows import PeerTensor

_MAX_BLOCK = 2048


def pull(
    tokens: PeerTensor,
    scores: PeerTensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor,
    row_scores: torch.Tensor | None = None,
) -> None:
    """As ops/peer_rows.py's `pull`, into rows and row_scores."""
    num_ranks, num_tokens, top_k = targets.shape
    weighted = scores is not None
    _pull[(num_ranks * num_tokens,)](
        tokens.addresses,
        scores.addresses if weighted else None,
        targets,
        rows,
        row_scores,
        num_ranks,
        num_tokens,
        *_constants(rows.shape[1], top_k, weighted),
    )


def push(
    rows: torch.Tensor,
    row_scores: torch.Tensor | None,
    targets: torch.Tensor,
    choices: PeerTensor,
    scores: PeerTensor | None,
) -> None:
    """As ops/peer_rows.py's `push`."""
    num_ranks, num_tokens, top_k = targets.shape
    weighted = scores is not None
    _push[(num_ranks * num_tokens,)](
        choices.addresses,
        scores.addresses if weighted else None,
        targets,
        rows,
        row_scores,
        num_ranks,
        num_tokens,
        *_constants(rows.shape[1], top_k, weighted),
    )


def _constants(width: int, top_k: int, weighted: bool) -> tuple[int, int, int, bool, int]:
    block = min(_MAX_BLOCK, triton.next_power_of_2(width))
    return width, top_k, triton.next_power_of_2(top_k), weighted, block


@triton.jit
def _peer_pointer(addresses, peer, like):
    # An address says nothing of its alignment, without which a row would move in small pieces.
    pointer = tl.load(addresses + peer).to(tl.pointer_type(like.dtype.element_ty))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _whose(num_ranks):
    # Ranks in turn, so that all links and this GPU's own memory are busy together.
    program = tl.program_id(0).to(tl.int64)
    return program % num_ranks, program // num_ranks


@triton.jit
def _pull(
    tokens,
    scores,
    targets,
    rows,
    row_scores,
    num_ranks,
    num_tokens,
    width: tl.constexpr,
    top_k: tl.constexpr,
    slots: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    peer, token = _whose(num_ranks)
    place = peer * num_tokens + token
    slot = tl.arange(0, slots)
    target = tl.load(targets + place * top_k + slot, slot < top_k, other=-1)
    if tl.max(target) >= 0:
        source = _peer_pointer(tokens, peer, rows) + token * width
        for start in range(0, width, block):
            columns = start + tl.arange(0, block)
            inside = columns < width
            data = tl.load(source + columns, inside)
            for k in range(top_k):
                row = tl.load(targets + place * top_k + k).to(tl.int64)
                tl.store(rows + row * width + columns, data, inside & (row >= 0))
        if weighted:
            here = target >= 0
            score = tl.load(_peer_pointer(scores, peer, row_scores) + token * top_k + slot, here)
            tl.store(row_scores + target, score, here)


@triton.jit
def _push(
    choices,
    scores,
    targets,
    rows,
    row_scores,
    num_ranks,
    num_tokens,
    width: tl.constexpr,
    top_k: tl.constexpr,
    slots: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    peer, token = _whose(num_ranks)
    place = peer * num_tokens + token
    slot = tl.arange(0, slots)
    target = tl.load(targets + place * top_k + slot, slot < top_k, other=-1)
    if tl.max(target) >= 0:
        out = _peer_pointer(choices, peer, rows) + token * top_k * width
        for start in range(0, width, block):
            columns = start + tl.arange(0, block)
            inside = columns < width
            for k in range(top_k):
                row = tl.load(targets + place * top_k + k).to(tl.int64)
                mask = inside & (row >= 0)
                data = tl.load(rows + row * width + columns, mask)
                tl.store(out + k * width + columns, data, mask)
        if weighted:
            here = target >= 0
            score = tl.load(row_scores + target, here)
            tl.store(_peer_pointer(scores, peer, row_scores) + token * top_k + slot, score, here)
