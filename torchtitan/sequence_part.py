"""Which tokens of a sequence does a rank have? Vocabulary of models, data and context parallelism."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class SequencePart:
    """One of `num_ranks` equal parts of every sequence; the default is all of it.

    With `head_tail` a rank has two pieces, one as far from the start as the other from the end, so that
    its tokens see as many before them as any other rank's.
    """

    rank: int = 0
    num_ranks: int = 1
    head_tail: bool = False

    def spans(self, length: int) -> list[range]:
        """The rank's places in a sequence of this length, piece by piece, in ascending order."""
        num_pieces = 2 * self.num_ranks if self.head_tail else self.num_ranks
        assert length % num_pieces == 0, f"{length} tokens in {num_pieces} pieces"
        size = length // num_pieces
        pieces = [self.rank, num_pieces - 1 - self.rank] if self.head_tail else [self.rank]
        return [range(piece * size, (piece + 1) * size) for piece in pieces]

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """The rank's part of x (B, L, ...) along L."""
        if self.num_ranks == 1:
            return x
        return torch.cat([x[:, span.start : span.stop] for span in self.spans(x.shape[1])], dim=1)

    def of_all_ranks(self) -> list["SequencePart"]:
        """Every rank's part of the same sequences."""
        return [replace(self, rank=rank) for rank in range(self.num_ranks)]


WHOLE = SequencePart()
