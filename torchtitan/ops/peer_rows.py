"""Rows copied between ranks through memory that all of them reach; each rank does its own part.

P ranks, T tokens that a rank has at most, K top-k, R rows of this rank's experts, D width. `targets`
(P, T, K) int32 names, for each choice of every rank's tokens, the row that it is here, or -1 where
its expert is another rank's.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PeerTensor:
    """The same tensor in every rank's memory; this rank may read and write all of them."""

    of_rank: tuple[torch.Tensor, ...]
    addresses: torch.Tensor
    """(P,) int64: where they are, for kernels."""


def pull(
    tokens: PeerTensor, scores: PeerTensor | None, targets: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, ...]:
    """tokens (T, D) and scores (T, K) of all ranks to rows (R, D) and their scores (R,).

    Each token is read once however many rows it becomes. Rows that no target names are undefined.
    """
    own = tokens.of_rank[0]
    rows = own.new_empty(num_rows, own.shape[1])
    row_scores = () if scores is None else (scores.of_rank[0].new_empty(num_rows),)
    if own.is_cuda:
        from torchtitan.ops import peer_kernels  # PyTorch for CPUs comes without Triton

        peer_kernels.pull(tokens, scores, targets, rows, *row_scores)
        return rows, *row_scores
    for rank, (choices, row) in enumerate(_here(targets)):
        rows[row] = tokens.of_rank[rank][choices // targets.shape[2]]
        for out in row_scores:
            out[row] = scores.of_rank[rank].flatten()[choices]
    return rows, *row_scores


def push(
    rows: torch.Tensor,
    row_scores: torch.Tensor | None,
    targets: torch.Tensor,
    choices: PeerTensor,
    scores: PeerTensor | None,
) -> None:
    """The way back: rows (R, D) to the place of each rank's own choice, (T, K, D); scores to (T, K)."""
    if rows.is_cuda:
        from torchtitan.ops import peer_kernels  # PyTorch for CPUs comes without Triton

        peer_kernels.push(rows, row_scores, targets, choices, scores)
        return
    for rank, (places, row) in enumerate(_here(targets)):
        choices.of_rank[rank].flatten(0, 1)[places] = rows[row]
        if scores is not None:
            scores.of_rank[rank].view(-1)[places] = row_scores[row]


def _here(targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By rank: which of its T * K choices are rows here, and which rows."""
    flat = [of_rank.flatten().long() for of_rank in targets]
    places = [(of_rank >= 0).nonzero().squeeze(1) for of_rank in flat]
    return [(place, of_rank[place]) for place, of_rank in zip(places, flat, strict=True)]
