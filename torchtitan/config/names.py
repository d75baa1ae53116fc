"""What did the user mean by a name that does not exist? Present names of keys, and the nearest of values."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from torchtitan.config.faults import Fault

RENAMED = {
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "eval.*": "validation.*",
    "float8.*": "quantize.linear.float8.*",
    "global.dump_folder": "job.dump_folder",
    "job.print_args": "job.print_config",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "mx.*": "quantize.linear.mx.*",
    "profiling.profile_every_x_iter": "profiling.profile_freq",
    "profiling.run_profiler": "profiling.enable_profiling",
    "quantize.dense.*": "quantize.linear.*",
    "quantize.moe.*": "quantize.grouped_mm.*",
    "training.batch_size": "training.local_batch_size",
    "training.checkpoint_*": "checkpoint.*",
    "training.compile": "compile.enable",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.sequence_parallel_degree": "parallelism.tensor_parallel_degree",
    "validation.enabled": "validation.enable",
}
"""Keys that older releases of upstream had, and what they are called now; a star stands for itself.

Keys that moved under the same name need no entry: a key known to another section is answered so.
"""

REPLACED = {
    "checkpoint.interval_type": "checkpoint.interval always counts steps.",
    "encoder.auto_encoder_path": "It was renamed to encoder.autoencoder_path, a key of Flux.",
    "experimental.torch_spmd": "There is no such mode any more.",
    "float8.enable_float8_linear": 'Write model.converters = ["quantize.linear.float8"].',
    "job.use_for_integration_test": "There is no such key any more.",
    "metrics.enable_color_printing": "Write metrics.disable_color_printing, the opposite.",
    "model.attn_mask_type": "The flavor chooses attention: model.flavor = debugmodel_flex_attn.",
    "model.norm_type": "Every family has the norm it was published with.",
    "model.use_flex_attn": "The flavor chooses attention: model.flavor = debugmodel_flex_attn.",
    "training.enable_float8_linear": 'Write model.converters = ["quantize.linear.float8"].',
    "training.fp8_linear": 'Write model.converters = ["quantize.linear.float8"].',
    "training.guidance": "It was a key of Flux.",
    "training.warmup_pct": "Write lr_scheduler.warmup_steps, in steps.",
}
"""Keys that older releases of upstream had, and what to do now that no one key replaces them."""


def leaf_keys(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name and value of every key of a config (or, of a class, with its defaults)."""
    if isinstance(section, type):
        section = section()
    keys: dict[str, Any] = {}
    for key in dataclasses.fields(section):
        value, name = getattr(section, key.name), prefix + key.name
        if dataclasses.is_dataclass(value):
            keys |= leaf_keys(value, name + ".")
        else:
            keys[name] = value
    return keys


def section_names(keys: Iterable[str]) -> list[str]:
    """Every section that the keys lie in: training, training.dataloader, ..."""
    parts = (key.split(".")[:-1] for key in keys)
    return sorted({".".join(path[:end]) for path in parts for end in range(1, len(path) + 1)})


def present_name(old: str, known: Iterable[str]) -> str:
    """What to write instead of a key that an older release had; empty for any other key."""
    if old in REPLACED:
        return REPLACED[old]
    for pattern, new in RENAMED.items():
        if old == pattern.removesuffix(".*"):
            return f"It was renamed to {new.removesuffix('.*')}."
        stem = pattern.removesuffix("*")
        if stem != pattern and old.startswith(stem):
            name = new.removesuffix("*") + old.removeprefix(stem)
            return f"It was renamed to {name if name in set(known) else new}."
    return ""


def suggest(unknown: str, known: Iterable[str]) -> str:
    """Advice for a key, dotted, that is not among the known ones; empty where none comes near."""
    known = list(known)
    if advice := present_name(unknown, known):
        return advice
    section, _, name = unknown.rpartition(".")
    sections = section_names(known)
    home = section if section in sections else nearest(section, sections)
    at_home = [_name(key) for key in known if key == f"{home}.{_name(key)}"]
    if home != section and name in at_home:
        return f"Did you mean {home}.{name}?"
    if namesakes := [key for key in known if _name(key) == name]:
        return f"It exists as {' and '.join(namesakes)}."
    if near := nearest(name, at_home):
        return f"Did you mean {home}.{near}?"
    if near := nearest(name, [_name(key) for key in known], cutoff=0.8):
        return f"Did you mean {' or '.join(key for key in known if _name(key) == near)}?"
    return ""


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """The most alike of the words, in whatever case; empty where none is alike."""
    spelt = {known.lower(): known for known in words}
    near = difflib.get_close_matches(word.lower(), list(spelt), n=1, cutoff=cutoff)
    return spelt[near[0]] if near else ""


def did_you_mean(value: str, known: Iterable[str], otherwise: str = "") -> str:
    """Advice for a value that is none of the known: the most alike, as TOML writes it, else `otherwise`."""
    near = nearest(value, known)
    return f'Did you mean "{near}"?' if near else otherwise


def unknown_value(setting: str, value: str, known: Iterable[str]) -> Fault:
    """The fault of a value that is none of the known."""
    known = list(known)
    remedy = did_you_mean(value, known, f"Known: {', '.join(known)}.")
    return Fault(setting, "no such name.", remedy, value)


def unknown_key(table: str, key: str, value: object, what: str, known: Iterable[str]) -> Fault:
    """The fault of a key that is none of the known, in the table at a path; `what` says what that is."""
    near = nearest(key, known)
    remedy = f"Did you mean {near}?" if near else f"Keys: {', '.join(known)}."
    return Fault(f"{table}.{key}", f"is not a key of {what}.", remedy, value)


def _name(key: str) -> str:
    return key.rpartition(".")[2]
