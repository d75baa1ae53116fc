"""What a Hugging Face folder has beside weights, and how it comes to be under its name."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.checkpoint.hf_files import read_json
from torchtitan.checkpoint.hf_names import CONFIG, GENERATION, TOKENIZER
from torchtitan.config.faults import ConfigError, Fault

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes its final name when all is written in it. Collective.

    Raises ConfigError where there are files under that name.
    """
    refuse_files(folder)
    temporary = folder.with_name(f"{folder.name}.tmp")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    yield temporary
    barrier()
    if rank() == 0:
        temporary.replace(folder)
    barrier()


def refuse_files(folder: Path) -> None:
    """Raise ConfigError where there are files under a name that is to be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError([Fault(str(folder), "is there already.", "Name a new folder.")])


def write_config(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype, assets: Path | None
) -> None:
    """Write config.json and generation_config.json, and copy a tokenizer's files from `assets`."""
    tokens: dict[str, int | None] = dict.fromkeys(_TOKENS)
    if assets is not None:
        for pattern in (*TOKENIZER, GENERATION):
            for file in assets.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        tokens |= _special_tokens(assets)
    # As transformers 4 calls it; 5 reads it too.
    dtype_name = {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / CONFIG, {**config, **tokens, **dtype_name})
    if not (folder / GENERATION).exists():
        write_json(folder / GENERATION, {"_from_model_config": True, **tokens})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _special_tokens(assets: Path) -> dict[str, int]:
    """Ids from a folder's config.json, or else by the names that its tokenizer gives them."""
    if (assets / CONFIG).exists():
        config = read_json(assets / CONFIG)
        return {key: config[key] for key in _TOKENS if key in config}
    files = (assets / "tokenizer.json", assets / "tokenizer_config.json")
    if not all(file.exists() for file in files):
        return {}
    tokenizer, names = map(read_json, files)
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    tokens = {key: names.get(key.removesuffix("_id")) for key in _TOKENS}
    contents = {key: t["content"] if isinstance(t, dict) else t for key, t in tokens.items()}
    return {key: ids[content] for key, content in contents.items() if content in ids}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
