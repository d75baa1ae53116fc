"""Train the small tokenizer of tests/assets/tokenizer: byte-level BPE, vocabulary 2048.

    python scripts/train_tokenizer.py --output tests/assets/tokenizer [--text FILE.jsonl] [--vocab-size N]

Works for other text as well: JSON lines with a "text" key. The result is a pair of Hugging Face files,
tokenizer.json and tokenizer_config.json.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ASSETS = Path(__file__).resolve().parents[1] / "tests" / "assets"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# Words with their leading space, numbers of up to three digits, punctuation, line breaks, runs of spaces.
SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=ASSETS / "c4_test" / "data.jsonl")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()

    tokenizer = train(args.text, args.vocab_size)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.output / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True, "add_eos_token": True}
    (args.output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{args.output}: {tokenizer.get_vocab_size()} tokens")


def train(text: Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is out of vocabulary
        show_progress=False,
    )
    with open(text, encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    assert tokenizer.get_vocab_size() == vocab_size, (
        f"{tokenizer.get_vocab_size()} tokens, wanted {vocab_size}"
    )
    return tokenizer


if __name__ == "__main__":
    main()
