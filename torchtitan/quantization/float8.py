"""Linear layers that multiply in float8, by torchao, and the output head: `quantize.linear.float8`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan.config.faults import Fault
from torchtitan.config.nested import with_value
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.local_parts import with_local_part
from torchtitan.distributed.mesh import Degrees
from torchtitan.quantization.conversion import Conversion, alike
from torchtitan.quantization.hardware import hardware_faults
from torchtitan.quantization.library import torchao
from torchtitan.quantization.linear import HEAD, HIGH_PRECISION, Widths, choose_layers, split_faults

NAME = "quantize.linear.float8"
FILTER = f"{NAME}.filter_fqns"
AUTO_FILTER = "auto_filter_small_kn"
"""A filter, as upstream spells it: layers too small to gain by float8."""
MULTIPLE = 16
"""Of which float8 products need their widths."""


def convert(model: nn.Module, config: JobConfig) -> Conversion:
    """Exchange Linear layers for those of torchao, as quantize.linear.float8 says, in place."""
    float8 = torchao("float8")
    options = config.quantize.linear.float8
    recipe = options.recipe_name or "tensorwise"
    filters = [part for part in options.filter_fqns if part != AUTO_FILTER]
    gains = None
    if AUTO_FILTER in options.filter_fqns:
        gains = float8._auto_filter_for_recipe(recipe, [])  # no public name in 0.18
    tp = config.parallelism.tensor_parallel_degree
    converted, left = choose_layers(
        model, filters, partial(_why_left, gains), partial(_why_head_left, gains, tp), FILTER
    )
    settings = replace(
        float8.Float8LinearConfig.from_recipe_name(recipe),
        emulate=options.emulate,
        enable_fsdp_float8_all_gather=options.enable_fsdp_float8_all_gather,
        pad_inner_dim=_pads_tokens(config),
    )
    float8.convert_to_float8_training(
        model, config=settings, module_filter_fn=lambda _, name: name in converted
    )
    if HEAD in converted:
        model.get_submodule(HEAD).quantize(recipe, options.emulate)
    if settings.enable_fsdp_float8_all_gather:
        model.register_state_dict_post_hook(_unwrap)
    scales = options.precompute_float8_dynamic_scale_for_fsdp
    return Conversion(
        NAME,
        converted,
        left,
        "Linear layers",
        recipe,
        FILTER,
        weights_changed=float8.precompute_float8_dynamic_scale_for_fsdp if scales else None,
    )


def _why_left(gains: Callable[[nn.Module, str], bool] | None, layer: nn.Linear) -> str:
    if any(n % MULTIPLE for n in layer.weight.shape):
        return f"widths must divide by {MULTIPLE}"
    return "too small to gain" if gains is not None and not gains(layer, "") else ""


def _why_head_left(gains: Callable[[nn.Module, str], bool] | None, tp: int, head: nn.Module) -> str:
    if tp > 1:  # its loss is DTensor's, of whole logits split over the vocabulary
        return f"tensor parallelism: {HIGH_PRECISION}"
    if head.weight is None:
        return "tied to the embedding"
    vocab_size, dim = head.weight.shape
    return _why_left(gains, nn.Linear(dim, vocab_size, bias=False, device="meta"))


def _pads_tokens(config: JobConfig) -> bool:
    """Whether a weight's gradient is a product over a number of tokens that float8 does not take."""
    training, parallelism = config.training, config.parallelism
    sequences = training.local_batch_size
    if parallelism.pipeline_parallel_degree > 1:
        sequences = parallelism.pipeline_parallel_microbatch_size
    tokens = sequences * training.seq_len // parallelism.context_parallel_degree
    # Shared experts may have the part of them that a tensor-parallel rank routes.
    return tokens % (MULTIPLE * parallelism.tensor_parallel_degree) > 0


def device_faults(config: JobConfig, device: torch.device) -> Iterator[Fault]:
    """A fault where the device has no float8 products and they are not emulated."""
    if not config.quantize.linear.float8.emulate:
        remedy = "Set it to true to try a config out, slowly."
        yield from hardware_faults(device, (8, 9), "float8 products", f"{NAME}.emulate", False, remedy)


def layout_faults(config: JobConfig, widths: Widths, degrees: Degrees) -> Iterator[Fault]:
    """Faults where the layout splits layers as float8, or gathering it, does not take them."""
    options = config.quantize.linear.float8
    if not options.emulate:
        yield from split_faults(NAME, widths, MULTIPLE, degrees.tp)
    ranks = degrees.dp_shard * degrees.cp
    # The head's weight is gathered in the compute dtype.
    odd = {alike(name): rows for name, (rows, _) in widths.items() if rows % ranks and name != HEAD}
    if options.enable_fsdp_float8_all_gather and odd:
        layers = ", ".join(f"{rows} rows of {name}" for name, rows in odd.items())
        reason = f"weights sharded over {ranks} ranks must divide evenly, and these do not: {layers}."
        remedy = "Set it to false, or filter these layers."
        yield Fault(f"{NAME}.enable_fsdp_float8_all_gather", reason, remedy, True)


def emulated(config: JobConfig) -> JobConfig:
    """The config with emulated products."""
    return with_value(config, f"{NAME}.emulate", True)


def _unwrap(model: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: object) -> None:
    """Give checkpoints plain weights, the same memory, and not what FSDP gathers as float8."""
    state.update({name: _plain(tensor) for name, tensor in state.items()})


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return getattr(tensor, "_tensor", tensor)  # of torchao's WeightWithDynamicFloat8CastTensor
    local = tensor.to_local()
    inner = _plain(local)
    return tensor if inner is local else with_local_part(tensor, inner)
