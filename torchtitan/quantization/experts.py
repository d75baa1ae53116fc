"""What converters of grouped experts have in common: which MoE layers they convert, and what forbids it."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.names import did_you_mean
from torchtitan.config.near_numbers import nearest_multiples
from torchtitan.config.schema import JobConfig
from torchtitan.ops.quantized_kernels import EMULATED, recipe_of
from torchtitan.quantization.conversion import Conversion, alike

PRODUCTS = "these products of experts"
"""What hardware may not have, in words."""


def convert_experts(
    model: nn.Module,
    config: JobConfig,
    name: str,
    fqns: list[str] | str,
    recipe: str,
    emulate: bool,
    **options: Any,
) -> Conversion:
    """Let experts whose names have a part of fqns multiply by a recipe of ops/quantized_kernels.py.

    In place. `name` is the converter's, `options` are for `MoE.quantize_experts`. Raises ConfigError for
    what cannot work.
    """
    layers = {
        f"{path}.experts": module
        for path, module in model.named_modules()
        if hasattr(module, "quantize_experts")
    }
    key, parts = f"{name}.fqns", _parts(fqns)
    alignment = recipe_of(recipe).alignment
    faults = [_matches_nothing(part, list(layers), key) for part in parts if part not in "\n".join(layers)]
    faults += _split_faults(config, name, {x.experts.w2.shape[2] for x in layers.values()}, alignment)
    faults += _chunk_faults(config, name, recipe)
    if config.moe.experts_backend != "auto":
        reason = f"names other products of experts than {name}."
        faults.append(Fault("moe.experts_backend", reason, 'Use "auto".', config.moe.experts_backend))
    if faults:
        raise ConfigError(faults)
    backend = f"{EMULATED}{recipe}" if emulate else recipe
    converted, left = [], {}
    for path, layer in layers.items():
        if reason := _why_left(path, layer, parts, alignment):
            left[path] = reason
        else:
            layer.quantize_experts(backend, **options)
            converted.append(path)
    return Conversion(name, tuple(converted), left, "MoE layers' experts", recipe, key)


def _parts(fqns: list[str] | str) -> list[str]:
    parts = fqns.split(",") if isinstance(fqns, str) else fqns
    return [part.strip() for part in parts if part.strip()]


def _why_left(path: str, layer: nn.Module, parts: list[str], alignment: int) -> str:
    if not any(part in path for part in parts):
        return "not in fqns"
    experts = layer.experts
    if recipe_of(experts.backend) is not None:
        return "converted already"
    if any(width % alignment for width in experts.w2.shape[1:]):
        return f"widths must divide by {alignment}"
    if experts.b13 is not None and layer.dispatcher.score_before_experts:
        # Rows that fill groups would be biases in the products of weight gradients, and set scales.
        return "biases after scores"
    return ""


def _matches_nothing(part: str, names: list[str], key: str) -> Fault:
    ends = {end for name in names for end in (name, *name.split("."))}
    kinds = ", ".join(dict.fromkeys(map(alike, names))) or "none"
    remedy = did_you_mean(part, sorted(ends), f"There are: {kinds}.")
    return Fault(key, "is in the name of no MoE layer's experts.", remedy, part)


def _split_faults(config: JobConfig, name: str, widths: set[int], alignment: int) -> Iterator[Fault]:
    """A fault where the layout splits experts to widths that are no multiples."""
    parallelism, key = config.parallelism, "expert_tensor_parallel_degree"
    if parallelism.expert_parallel_degree == 1:
        key = "tensor_parallel_degree"
    degree = getattr(parallelism, key)
    if odd := [width for width in widths if width % (degree * alignment) and not width % alignment]:
        sizes = ", ".join(f"{width} / {degree}" for width in odd)
        reason = f"splits experts to widths of {sizes}, and {name} needs multiples of {alignment}."
        yield Fault(f"parallelism.{key}", reason, "Use a smaller degree.", degree)


def _chunk_faults(config: JobConfig, name: str, recipe: str) -> Iterator[Fault]:
    """A fault where experts cannot work on so many rows at a time."""
    size, alignment = config.moe.max_rows_per_chunk, recipe_of(recipe).alignment
    if size and recipe_of(recipe).weights:
        reason = f"changes no results, but with {name} ({recipe}) scales of weight gradients would follow it."
        remedy = 'Use 0, or quantize.grouped_mm.float8 with recipe_name = "rowwise_with_gw_hp".'
        yield Fault("moe.max_rows_per_chunk", reason, remedy, size)
    elif size % alignment:
        reason = f"must be a multiple of {alignment} rows for {name}."
        remedy = f"Use {nearest_multiples(alignment, size)}."
        yield Fault("moe.max_rows_per_chunk", reason, remedy, size)
