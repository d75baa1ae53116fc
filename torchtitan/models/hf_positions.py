"""RoPE's base and scaling as Hugging Face's config.json states them."""

from collections.abc import Mapping
from typing import Any

from torchtitan.models.rope import RoPEScaling, YaRNScaling

_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_seq_len",
}
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}


def read_positions(left: dict[str, Any]) -> tuple[float, RoPEScaling | YaRNScaling | None]:
    """RoPE's base and scaling, taken out of `left`; ValueError for kinds that are not known."""
    theta = left.pop("rope_theta", None)
    given = left.pop("rope_parameters", None) or {}
    left_scaling = left.pop("rope_scaling", None) or {}
    given = {name: v for name, v in {**left_scaling, **given}.items() if v is not None}
    theta = float(given.pop("rope_theta", theta or 10_000.0))
    kinds = {given.pop("type", None), given.pop("rope_type", None)} - {None}
    kind = kinds.pop() if len(kinds) == 1 else ("default" if not kinds else str(kinds))
    if kind == "default":
        scaling = None
    elif kind == "llama3":
        scaling = RoPEScaling(**_take(given, _LLAMA3))
    elif kind == "yarn":
        scaling = _yarn(_take(given, _YARN))
    else:
        raise ValueError(f"rope_type {kind!r} is not supported; default, llama3 and yarn are")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported")
    if given:
        raise ValueError(f"{', '.join(sorted(given))} is not supported with rope_type {kind!r}")
    return theta, scaling


def write_scaling(scaling: RoPEScaling | YaRNScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    kind, names = ("yarn", _YARN) if isinstance(scaling, YaRNScaling) else ("llama3", _LLAMA3)
    return {"rope_type": kind, **{theirs: getattr(scaling, ours) for theirs, ours in names.items()}}


def _take(given: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    for name in ("factor", "original_max_position_embeddings"):
        if name not in given:
            raise ValueError(f"{name} is missing")
    return {ours: given.pop(name) for name, ours in names.items() if name in given}


def _yarn(values: dict[str, Any]) -> YaRNScaling:
    # transformers looks at mscale only where both of them are set.
    if not values.get("mscale_all_dim"):
        values = values | {"mscale": 1.0, "mscale_all_dim": 0.0}
    elif not values.get("mscale"):
        raise ValueError("mscale_all_dim without mscale is not supported")
    exact = ("original_max_seq_len", "truncate")
    return YaRNScaling(**{name: v if name in exact else float(v) for name, v in values.items()})
