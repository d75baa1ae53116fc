"""How do one slot's documents of one source become sequences of exact length?"""

import numpy as np

from torchtitan.data.source import BadDocument, DataError, Source
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.logging import logger
from torchtitan.ops.cross_entropy import IGNORE_INDEX

_NAMED = 10  # bad documents of a source that are all named; of more, each tenfold
_FRUITLESS = 100_000  # documents or epochs in a row without a single token: something is wrong


class SkipReport:
    """Says which documents of one source were bad, to all slots of a process together."""

    def __init__(self, source: str):
        self.source, self.count = source, 0

    def tell(self, error: BadDocument) -> None:
        self.count += 1
        if self.count <= _NAMED:
            more = "; of more, their number" if self.count == _NAMED else ""
            logger.warning(f"document skipped: {error}{more}")
        elif f"{self.count}".rstrip("0") == "1":
            logger.warning(f"{self.source}: {self.count} documents skipped so far; the last: {error}")


class PackedStream:
    """The tokens of a slot's documents end to end, handed out in pieces.

    Its place is four integers; tokens are never part of it, they are made again from the document.
    """

    def __init__(
        self, source: Source, slot: int, tokenizer: Tokenizer, repeat: bool, report: SkipReport
    ):
        self._source, self._slot, self._tokenizer, self._repeat = source, slot, tokenizer, repeat
        self._report = report
        self.epoch = 0
        self.document = 0  # of those that belong to the slot in this epoch
        self.offset = 0  # tokens of that document already handed out
        self.skipped = 0  # bad documents so far
        self._tokens: np.ndarray | None = None  # of the current document, once it is read

    @property
    def dry(self) -> bool:
        """One pass over the data was asked for and has ended."""
        return self.epoch > 0 and not self._repeat

    def fill(self, tokens: np.ndarray, labels: np.ndarray) -> list[int]:
        """Write the next tokens and their labels; returns the lengths of the pieces written.

        They sum to less than asked for only where the stream runs dry. A token's label is the token
        after it in the same document; the last of a document has none.
        """
        lengths: list[int] = []
        at = 0
        while at < len(tokens) and self._load():
            end = min(self.offset + len(tokens) - at, len(self._tokens))
            piece, following = (
                self._tokens[self.offset : end],
                self._tokens[self.offset + 1 : end + 1],
            )
            tokens[at : at + len(piece)] = piece
            labels[at : at + len(following)] = following
            labels[at + len(following) : at + len(piece)] = IGNORE_INDEX
            lengths.append(len(piece))
            at += len(piece)
            self.offset = end
            if end == len(self._tokens):
                self._next_document()
        return lengths

    def state_dict(self) -> dict[str, int]:
        return {
            "epoch": self.epoch,
            "document": self.document,
            "offset": self.offset,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.document = state["epoch"], state["document"]
        self.offset, self.skipped = state["offset"], state["skipped"]
        self._tokens = None

    def _load(self) -> bool:
        """Have the current document's tokens at hand, going on to the next while it has none."""
        fruitless = 0
        while self._tokens is None and not self.dry:
            if fruitless == _FRUITLESS:
                raise DataError(
                    f"{self._source.name}: no text for slot {self._slot} in {fruitless} tries"
                )
            fruitless += 1
            try:
                document = self._source.read(self._slot, self.epoch, self.document)
            except BadDocument as error:
                self._skip(error)
                continue
            if document is None:
                self.epoch, self.document = self.epoch + 1, 0
                continue
            tokens = self._tokenize(document)
            if self.offset and self.offset >= len(tokens):
                raise DataError(
                    f"{self._source.name}: resuming at token {self.offset} of a document that has "
                    f"{len(tokens)}: data or tokenizer is not the one the checkpoint was made with"
                )
            if len(tokens):
                self._tokens = tokens
            else:
                self._next_document()
        return self._tokens is not None

    def _tokenize(self, document: str | np.ndarray) -> np.ndarray:
        if isinstance(document, str):
            return np.asarray(self._tokenizer.encode(document), dtype=np.int32)
        if len(document) and document.max() >= self._tokenizer.vocab_size:
            raise DataError(
                f"{self._source.name}: token {document.max()} in a pre-tokenized document, "
                f"but the tokenizer has only {self._tokenizer.vocab_size}: it is another one"
            )
        return document.astype(np.int32)

    def _skip(self, error: BadDocument) -> None:
        self.skipped += 1
        self._report.tell(error)
        self._next_document()

    def _next_document(self) -> None:
        self._tokens, self.document, self.offset = None, self.document + 1, 0
