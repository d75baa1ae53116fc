"""Which experts the converters of grouped products convert, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.models import gpt_oss, llama3, llama4, qwen3
from torchtitan.models.registry import model_config
from torchtitan.preflight import checked_model
from torchtitan.quantization import converters, float8_experts, mx_experts

FLOAT8, MX = float8_experts.NAME, mx_experts.NAME
FAMILIES = {  # converted experts of how many MoE layers
    "qwen3": ("debugmodel_moe", 8),
    "deepseek_v3": ("debugmodel", 5),
    "gpt_oss": ("debugmodel", 4),
    "llama4": ("debugmodel", 3),
    "mixtral": ("debugmodel", 6),
}


def config_of(*options, converter=FLOAT8, fqns="experts"):
    return load_config([f"--model.converters={converter}", f"--{converter}.fqns={fqns}", *options])


def converted(model, config):
    with torch.device("meta"):
        whole = model.build()
    [done] = converters.convert(whole, config)
    return whole, done


@pytest.mark.parametrize("converter", [FLOAT8, MX])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_of_every_family_are_converted(family, converter):
    flavor, count = FAMILIES[family]
    flavor = model_config(family, flavor, {})
    config = config_of(converter=converter)
    names = [name for name, _ in flavor.build().named_parameters()]
    model, done = converted(flavor, config)
    assert len(done.converted) == count == flavor.n_moe_layers and not done.left
    assert names == [name for name, _ in model.named_parameters()]
    alignment = {FLOAT8: 16, MX: 32}[converter]
    for name in done.converted:
        layer = model.get_submodule(name.removesuffix(".experts"))
        assert layer.experts.backend == {FLOAT8: "float8_rowwise", MX: "mxfp8"}[converter]
        assert layer.dispatcher.row_alignment == alignment
    assert f"{count} of {count} MoE layers' experts converted" in str(done)


def test_fqns_choose_layers_and_the_others_are_named():
    model, done = converted(qwen3.FLAVORS["debugmodel_moe"], config_of(fqns="layers.1.moe,layers.3"))
    assert done.converted == ("layers.1.moe.experts", "layers.3.moe.experts")
    assert set(done.left.values()) == {"not in fqns"} and len(done.left) == 6
    assert model.layers["0"].moe.dispatcher.row_alignment == 1
    assert "left: 6 layers.*.moe.experts (not in fqns)" in str(done)


@pytest.mark.parametrize("options, backend", [
    ((f"--{FLOAT8}.emulate",), "emulated_float8_rowwise"),
    ((f"--{FLOAT8}.recipe_name=rowwise_with_gw_hp",), "float8_rowwise_with_gw_hp"),
    ((f"--model.converters={MX}", f"--{MX}.fqns=moe", f"--{MX}.recipe_name=mxfp8_emulated"),
     "emulated_mxfp8"),
])  # fmt: skip
def test_options_choose_the_recipe(options, backend):
    model, _ = converted(qwen3.FLAVORS["debugmodel_moe"], config_of(*options))
    assert {layer.moe.experts.backend for layer in model.layers.values()} == {backend}


def test_widths_and_biases_that_do_not_fit_are_left():
    odd = replace(llama4.FLAVORS["debugmodel"].moe, ffn_dim=40)
    with pytest.raises(ConfigError, match=r"none of the model's MoE .*widths must divide by 16"):
        converted(replace(llama4.FLAVORS["debugmodel"], moe=odd), config_of())
    before = replace(gpt_oss.FLAVORS["debugmodel"].moe, score_before_experts=True)
    with pytest.raises(ConfigError, match="biases after scores"):
        converted(replace(gpt_oss.FLAVORS["debugmodel"], moe=before), config_of())


REFUSED = {
    "nothing of that name": (("--quantize.grouped_mm.float8.fqns=expert_",), "Did you mean"),
    "no name at all": (("--quantize.grouped_mm.float8.fqns=feed_forward",), "layers.*.moe.experts"),
    "chunks that would set scales": (
        ("--moe.max_rows_per_chunk=64",), 'recipe_name = "rowwise_with_gw_hp"'),
    "chunks off the alignment": (
        ("--moe.max_rows_per_chunk=40", f"--{FLOAT8}.recipe_name=rowwise_with_gw_hp"), "Use 32 or 48."),
    "experts split too thin": (
        ("--parallelism.tensor_parallel_degree=8",), "splits experts to widths of 64 / 8"),
    "split by the experts' degree": (
        ("--parallelism.tensor_parallel_degree=8", "--parallelism.expert_parallel_degree=2",
         "--parallelism.expert_tensor_parallel_degree=8"), "parallelism.expert_tensor_parallel_degree"),
    "two kinds of products": (("--moe.experts_backend=reference",), "names other products of experts"),
    "an exchange that is none": (
        (f"--{FLOAT8}.exchange_in_float8",), "parallelism.expert_parallel_degree = 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_the_start(case):
    options, message = REFUSED[case]
    config = config_of("--model.name=qwen3", "--model.flavor=debugmodel_moe", *options)
    model, faults = checked_model(config)
    assert model is None and any(message in str(fault) for fault in faults), list(map(str, faults))


def test_a_model_without_experts_has_none_to_convert():
    with pytest.raises(ConfigError, match="is in the name of no MoE layer's experts. There are: none"):
        converted(llama3.FLAVORS["debugmodel"], config_of())


@pytest.mark.parametrize("converter, key", [(FLOAT8, "emulate"), (MX, "recipe_name")])
def test_hardware_without_such_products_is_refused_by_name(converter, key, monkeypatch):
    config = config_of(converter=converter)
    with pytest.raises(ConfigError, match=rf"{converter}.{key}.* need a GPU"):
        converters.check_device(config, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="need compute capability .*, and this GPU has 8.0"):
        converters.check_device(config, torch.device("cuda"))
    converters.check_device(converters.emulated(config), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    converters.check_device(config, torch.device("cuda"))
    exact = replace(config, training=replace(config.training, mixed_precision_param="float32"))
    with pytest.raises(ConfigError, match="training.mixed_precision_param.* multiplies in bfloat16"):
        converters.check_device(exact, torch.device("cuda"))
