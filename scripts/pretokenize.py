"""Tokenize files once, for runs that should not do it while they train.

    python scripts/pretokenize.py --input 'corpus/*.jsonl.gz' --output corpus.bin [--tokenizer FOLDER] [--text-key text]

Then: training.dataset = "corpus.bin". BOS and EOS are in the file; nothing is added to it later.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from torchtitan.config.faults import EXIT_CONFIG, ConfigError
from torchtitan.data.files import DocumentFile, write_tokens
from torchtitan.data.indexed import open_files
from torchtitan.data.source import BadDocument
from torchtitan.data.tokenizer import Tokenizer, build_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="a file, a folder, or a glob pattern")
    parser.add_argument("--output", required=True, type=Path, help="the .bin file to write")
    parser.add_argument(
        "--tokenizer", default="tests/assets/tokenizer", help="folder with a tokenizer.json"
    )
    parser.add_argument("--text-key", default="text")
    args = parser.parse_args()
    if args.output.suffix != ".bin":
        parser.error(f"--output {args.output}: the name must end in .bin")
    try:
        tokenizer = build_tokenizer(args.tokenizer)
        files = open_files(args.input, args.text_key, "--input")
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    write_tokens(args.output, encoded(files, tokenizer), tokenizer.vocab_size)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")


def encoded(files: list[DocumentFile], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for file in files:
        for index in range(len(file)):
            try:
                document = file[index]
            except BadDocument as error:
                print(f"skipped: {error}", file=sys.stderr)
                continue
            yield tokenizer.encode(document) if isinstance(document, str) else document.tolist()


if __name__ == "__main__":
    main()
