"""Small data sets, and loaders of every rank side by side."""

import json
import random
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from torchtitan.data.batch import Batch, batch_hash
from torchtitan.data.files import write_tokens
from torchtitan.data.loader import DataConfig, Loader, build_loader
from torchtitan.data.tokenizer import build_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "assets"
TOKENIZER = build_tokenizer(ASSETS / "tokenizer")
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil oxen in ginger".split()


def texts(count: int, longest: int = 40, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def write_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def write_numbered(
    path: Path, lengths: list[int], first: int = 1, wrap: int = 100_000
) -> list[list[int]]:
    """Pre-tokenized documents of tokens that count up from `first`, over all of them, modulo `wrap`."""
    ends = list(accumulate(lengths, initial=0))
    documents = [[first + at % wrap for at in range(*ends_of)] for ends_of in pairwise(ends)]
    write_tokens(path, documents, TOKENIZER.vocab_size)
    return documents


def loaders(config: DataConfig, num_ranks: int = 1, num_workers: int = 0) -> list[Loader]:
    share = config.num_slots // num_ranks
    config = replace(config, num_workers=num_workers)
    return [
        build_loader(config, TOKENIZER, range(rank * share, (rank + 1) * share))
        for rank in range(num_ranks)
    ]


def run(
    config: DataConfig,
    steps: int,
    num_ranks: int = 1,
    num_workers: int = 0,
    states: dict[str, Any] | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Hashes of the global batches of some steps, and the state after them as a checkpoint keeps it."""
    ranks = loaders(config, num_ranks, num_workers)
    if states is not None:
        for loader in ranks:
            loader.load_state_dict(states)
    hashes = [batch_hash(*(next(loader) for loader in ranks)) for _ in range(steps)]
    merged = {slot: state for loader in ranks for slot, state in loader.state_dict().items()}
    return hashes, json.loads(json.dumps(merged))


def until_exhausted(loader: Loader, limit: int = 1000) -> list[Batch]:
    batches = []
    for batch in loader:
        if batch.exhausted:
            return batches
        batches.append(batch)
        assert len(batches) < limit, "the data does not end"
    raise AssertionError("a loader has no end")
