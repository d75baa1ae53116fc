"""What does one optimizer step train on?"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.sequence_part import WHOLE, SequencePart


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: S sequences of L tokens, a row for each slot."""

    tokens: torch.Tensor  # (S, L) int64
    labels: torch.Tensor  # (S, L) int64, IGNORE_INDEX where not trained on
    document_lengths: list[list[int]]
    """Of each sequence the lengths of its pieces, summing to L; padding is a piece too."""
    num_valid_tokens: int
    exhausted: bool
    """No slot of this rank had data left: every row is padding, and so is all that follows."""

    def cut(self, part: SequencePart) -> "Batch":
        """This part of every sequence; the document lengths stay those of whole sequences."""
        if part == WHOLE:
            return self
        tokens, labels = part.cut(self.tokens), part.cut(self.labels)
        num_valid_tokens = int(np.count_nonzero(labels.numpy() != IGNORE_INDEX))
        return replace(self, tokens=tokens, labels=labels, num_valid_tokens=num_valid_tokens)


def batch_hash(*shares: Batch) -> str:
    """A fingerprint of a global batch from its shares in rank order, however many they are."""
    digest = hashlib.sha256()
    for share in shares:
        for tokens, labels, lengths in zip(
            share.tokens, share.labels, share.document_lengths, strict=True
        ):
            digest.update(tokens.numpy().tobytes())
            digest.update(labels.numpy().tobytes())
            digest.update(np.asarray(lengths, dtype=np.int64).tobytes())
    return digest.hexdigest()
