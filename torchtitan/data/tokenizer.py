"""How does text become token ids, and do the ids fit the model?"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from torchtitan.config.faults import ConfigError, Fault

SETTING = "model.hf_assets_path"


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with the tokens that begin and end a document."""

    path: Path
    backend: tokenizers.Tokenizer
    vocab_size: int
    """Largest token id + 1, added tokens included."""
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    """The tokenizer's own post-processor already adds BOS."""
    adds_eos: bool

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Ids of one document, with BOS and EOS (once each) where the tokenizer has them."""
        ids = self.backend.encode(text).ids
        if add_bos and self.bos_id is not None and not self.adds_bos:
            ids.insert(0, self.bos_id)
        if add_eos and self.eos_id is not None and not self.adds_eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids)


def build_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder with tokenizer.json and, for BOS and EOS, tokenizer_config.json."""
    path = Path(path)
    if path.name.endswith("tokenizer.model"):
        reason = "SentencePiece and tiktoken files are not supported."
        raise _refused(path, reason, "Name a folder with a tokenizer.json.")
    if path.name == "tokenizer.json":
        path = path.parent
    if not (path / "tokenizer.json").is_file():
        reason = "has no tokenizer.json." if path.is_dir() else "there is no such folder."
        remedy = "Name a folder with a Hugging Face tokenizer, such as ./tests/assets/tokenizer."
        raise _refused(path, reason, remedy)
    backend = _read_backend(path)
    config = _read_config(path)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise _refused(path, "tokenizer.json holds an empty vocabulary.")
    bos_id, eos_id = (
        _special_id(path, config, key, vocabulary) for key in ("bos_token", "eos_token")
    )
    probe = backend.encode("a").ids  # shows what the post-processor puts around a text
    return Tokenizer(
        path=path,
        backend=backend,
        vocab_size=max(vocabulary.values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=probe[:1] == [bos_id],
        adds_eos=probe[-1:] == [eos_id],
    )


def check_tokenizer(tokenizer: Tokenizer, model_vocab_size: int) -> list[Fault]:
    """Every way in which the tokenizer's ids do not fit a model's embedding."""
    if tokenizer.vocab_size <= model_vocab_size:
        return []
    path = str(tokenizer.path)
    size = tokenizer.vocab_size
    remedy = f"Use the model's own tokenizer, or set model.overrides.vocab_size = {size} or more."
    reasons = [f"its ids reach {size - 1}"]
    for name, token_id in (("BOS", tokenizer.bos_id), ("EOS", tokenizer.eos_id)):
        if token_id is not None and token_id >= model_vocab_size:
            reasons.append(f"{name} has id {token_id}")
    embedded = f"the model embeds only {model_vocab_size}."
    return [Fault(SETTING, f"{reason}, {embedded}", remedy, path) for reason in reasons]


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for anything wrong with the file
        reason = f"tokenizer.json cannot be read: {error}."
        raise _refused(path, reason, "Download it again.") from error


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"tokenizer_config.json cannot be read: {error}."
        raise _refused(path, reason, "Download it again.") from error
    if not isinstance(config, dict):
        reason = f"tokenizer_config.json holds {type(config).__name__}, not an object."
        raise _refused(path, reason, "Download it again.")
    return config


def _special_id(
    path: Path, config: dict[str, Any], key: str, vocabulary: dict[str, int]
) -> int | None:
    token = config.get(key)
    if isinstance(token, dict):  # older files write the token with its flags
        token = token.get("content")
    if token is None:
        return None
    if token not in vocabulary:
        reason = f"tokenizer_config.json names the {key} {token!r}, which is not in the vocabulary."
        raise _refused(path, reason)
    return vocabulary[token]


def _refused(path: Path, reason: str, remedy: str = "") -> ConfigError:
    return ConfigError([Fault(SETTING, reason, remedy, str(path))])
