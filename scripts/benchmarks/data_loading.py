"""How fast does data reach the training loop? Tokens a second of the loader, beside the tokenizer alone.

    python scripts/benchmarks/data_loading.py --workers 0 2 4

Text is read, tokenized and packed as it is needed; tokens made beforehand are only read and packed. The
sample text of this repository, or files of your own (--dataset). Every batch is timed from asking for
it to having it. Compare with the tokens a second that one GPU trains on, times the GPUs of a machine.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, Spread, pick_device, table, write_report

from torchtitan.data.datasets import open_sources, parse_dataset
from torchtitan.data.files import write_tokens
from torchtitan.data.loader import DataConfig, build_loader
from torchtitan.data.source import Dealing
from torchtitan.data.tokenizer import Tokenizer, build_tokenizer


def tokenized(dataset: str, tokenizer: Tokenizer, num: int) -> Iterator[tuple[float, list[int]]]:
    """Of the first texts of a dataset: seconds that the tokenizer takes, and the tokens."""
    [source] = open_sources(parse_dataset(dataset), Dealing(num_slots=1, seed=0, shuffle=False))
    for index in range(num):
        text = source.read(slot=0, epoch=0, index=index)
        if text is None:  # there are no more
            return
        start = time.perf_counter()
        ids = tokenizer.encode(text)
        yield time.perf_counter() - start, ids


def batch_seconds(config: DataConfig, tokenizer: Tokenizer, num_batches: int) -> list[float]:
    """Of every batch, after a first one, with which workers start."""
    loader = build_loader(config, tokenizer, range(config.num_slots))
    next(loader)
    seconds = []
    for _ in range(num_batches):
        start = time.perf_counter()
        next(loader)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dataset", default="c4_test")
    parser.add_argument("--tokenizer", default=str(ROOT / "tests/assets/tokenizer"))
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--documents", type=int, default=2000, help="tokenized alone, and beforehand")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    tokenizer = build_tokenizer(args.tokenizer)
    seconds, tokens = zip(*tokenized(args.dataset, tokenizer, args.documents), strict=True)
    alone = Spread.of(len(ids) / s for s, ids in zip(seconds, tokens, strict=True))
    rows = [["the tokenizer alone, by document", "", None, format(alone, ",.0f")]]
    found: list[dict] = [{"source": "tokenizer alone", "tokens_per_second": alone}]
    with tempfile.TemporaryDirectory(prefix="torchtitan_tokens_") as folder:
        made = Path(folder) / "tokens.bin"
        write_tokens(made, tokens, tokenizer.vocab_size)
        for source, dataset in (("text", args.dataset), ("tokens", str(made))):
            for workers in args.workers:
                config = DataConfig(
                    dataset, args.batch_size, args.seq_len, seed=0, num_workers=workers,
                    persistent_workers=workers > 0,
                )  # fmt: skip
                milliseconds = [1e3 * s for s in batch_seconds(config, tokenizer, args.batches)]
                rate = args.batch_size * args.seq_len * args.batches / sum(milliseconds) * 1e3
                spread = Spread.of(milliseconds)
                rows.append([source, workers, format(spread, ".2f"), f"{rate:,.0f}"])
                found.append(
                    {"source": source, "workers": workers, "ms": spread, "tokens_per_second": rate}
                )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"batches of {args.batch_size} x {args.seq_len} tokens; peak memory {memory:.2f} GiB")
    print(table(("source", "workers", "ms a batch", "tokens/s"), rows))
    write_report(args.json, pick_device(), memory_gib=memory, results=found)


if __name__ == "__main__":
    main()
