"""How are datasets read that come as streams of shards, such as the Hugging Face Hub's?"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.data.files import text_of
from torchtitan.data.permutation import mix
from torchtitan.data.source import BadDocument, Dealing, Document
from torchtitan.logging import logger

_BUFFER = 1000
"""Documents drawn from at random: more are shuffled better, and take more memory in every slot."""

Shard = Callable[[], Iterable[Document | BadDocument]]


class StreamedSource:
    """Slot j reads shards j, j + num_slots, ... in an order drawn anew for every epoch, through a
    shuffling buffer. With fewer shards than slots every slot reads all of them and keeps its own
    documents, in turn: correct, but each slot pays for the whole stream.

    A slot's place is found again by reading its epoch from the start, without tokenizing.
    """

    def __init__(self, name: str, shards: Sequence[Shard], key: int, dealing: Dealing):
        self.name, self.shards, self.key, self.dealing = name, shards, key, dealing
        # By slot: epoch, next index, and the stream that yields it.
        self._open: dict[int, tuple[int, int, Iterator]] = {}
        if len(shards) < dealing.num_slots:
            logger.warning(
                f"{name}: {len(shards)} shards for {dealing.num_slots} slots: each streams all; "
                "local files are read without this cost (training.dataset_path)"
            )

    def read(self, slot: int, epoch: int, index: int) -> Document | None:
        *place, documents = self._open.get(slot, (None, None, None))
        if place != [epoch, index]:
            documents = islice(self._documents(slot, epoch), index, None)
        document = next(documents, None)
        self._open[slot] = (epoch, index + 1, documents)
        if isinstance(document, BadDocument):
            raise document
        return document

    def _documents(self, slot: int, epoch: int) -> Iterator[Document | BadDocument]:
        dealing = self.dealing
        in_turn = len(self.shards) < dealing.num_slots
        shards = list(self.shards if in_turn else self.shards[slot :: dealing.num_slots])
        # Slots that share the stream must agree on its order.
        draw = random.Random(mix(dealing.seed, self.key, epoch, 0 if in_turn else 1 + slot))
        if dealing.shuffle:
            draw.shuffle(shards)
        documents = (document for shard in shards for document in shard())
        if dealing.shuffle:
            documents = _shuffled(documents, draw)
        if in_turn:
            # Moving on by one slot an epoch, so that a few documents reach every slot in time.
            first = (slot - epoch) % dealing.num_slots
            documents = islice(documents, first, None, dealing.num_slots)
        return documents

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": {}}


def open_hub(name: str, subset: str | None, split: str, text_key: str, setting: str) -> list[Shard]:
    """The shards of a dataset of the Hugging Face Hub (or of a folder its library understands)."""
    try:
        import datasets
    except ImportError as error:
        reason = "streaming from the Hub needs the package datasets."
        remedy = (
            "pip install 'torchtitan[datasets]', "
            "or use local files or the offline c4_test and c4_test_validation."
        )
        raise ConfigError([Fault(setting, reason, remedy, name)]) from error
    try:
        dataset = datasets.load_dataset(name, subset, split=split, streaming=True)
    except (OSError, ValueError) as error:  # unknown name, subset or split; no network
        remedy = "Check the name and the network, or name local files in its dataset_path."
        raise ConfigError([Fault(setting, f"cannot be opened: {error}.", remedy, name)]) from error
    count = dataset.num_shards
    return [partial(_hub_shard, dataset, count, index, text_key, name) for index in range(count)]


def _hub_shard(
    dataset, count: int, index: int, text_key: str, name: str
) -> Iterator[Document | BadDocument]:
    # By batches: iterated singly, the library would split a shard again among DataLoader workers.
    rows = 0
    for batch in dataset.shard(num_shards=count, index=index).iter(batch_size=64):
        for values in zip(*batch.values(), strict=True):
            rows += 1
            try:
                yield text_of(dict(zip(batch, values)), text_key)
            except ValueError as error:
                yield BadDocument(f"{name}, shard {index}, row {rows}", str(error))


def _shuffled(documents: Iterator, draw: random.Random) -> Iterator:
    buffer = list(islice(documents, _BUFFER))
    for document in documents:
        place = draw.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = document
    draw.shuffle(buffer)
    yield from buffer
