"""What converters do to each family, what they tell of it, and what of a config they refuse."""

from dataclasses import replace

import pytest
import torch

from torchtitan import preflight, train
from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.distributed.mesh import Degrees
from torchtitan.models.init import parameter_inits
from torchtitan.models.registry import families, model_config
from torchtitan.ops.cross_entropy import chunked_linear_cross_entropy
from torchtitan.quantization import converters, float8, mx
from torchtitan.quantization.converters import convert, emulated, exact
from torchtitan.verify_case import alone, settle

FLOAT8, MX = "quantize.linear.float8", "quantize.linear.mx"
CONVERTED = {
    # Linear layers converted, and how many routers are left
    "deepseek_v3": (42, 5),
    "gpt_oss": (16, 4),
    "llama3": (42, 0),
    "llama4": (42, 3),
    "mixtral": (24, 6),
    "olmo2": (42, 0),
    "qwen3": (56, 0),
}


def load(*argv):
    return load_config(["--training.seq_len=64", *argv])


def build(config):
    model = model_config(config.model.name, config.model.flavor, config.model.overrides)
    with torch.device("meta"):
        return model.update_from_config(config).build()


def converted(*argv):
    config = load(*argv)
    model = build(config)
    return model, convert(model, config)


def refused(*argv):
    """The faults of a config, as texts."""
    with pytest.raises(ConfigError) as error:
        converted(*argv)
    return [str(fault) for fault in error.value.faults]


@pytest.mark.parametrize("name", [FLOAT8, MX])
@pytest.mark.parametrize("family", families())
def test_every_family_has_its_linear_layers_converted(family, name):
    argv = [f"--model.name={family}", f"--model.converters={name}"]
    model, [done] = converted(*argv)
    count, routers = CONVERTED[family]
    heads = int(name == FLOAT8 and family != "qwen3")  # whose debug model's is tied
    assert len(done.converted) == count + heads and ("output" in done.converted) == heads
    assert {layer for layer in done.left if layer.endswith("router.gate")} == set(list(done.left)[:routers])
    assert set(list(done.left.values())[:routers]) <= {"routers choose in high precision"}
    assert list(done.left)[routers:] == ["output"][heads:]
    kinds = {type(model.get_submodule(layer)).__name__ for layer in done.converted[:count]}
    assert kinds == {"Float8Linear" if name == FLOAT8 else "MXLinear"}
    plain = build(load(argv[0]))
    assert parameter_inits(model) == parameter_inits(plain)
    shapes = {name: weight.shape for name, weight in plain.state_dict().items()}
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes


def test_upstreams_name_means_the_same():
    [_, [done]] = converted("--model.converters=float8")
    assert done.name == FLOAT8


@pytest.mark.parametrize(
    ("old", "new"), [("mx", MX), ("quantize.dense.float8", FLOAT8), ("quantize.moe.mx", "quantize.grouped_mm.mx")]
)
def test_names_of_older_releases_are_answered_with_the_present_ones(old, new):
    [fault] = converters.unknown_converters(load(f"--model.converters={old}"))
    assert str(fault) == f'model.converters = "{old}": no such name. It was renamed to {new}.'


ASKED = {
    f"{FLOAT8}.recipe_name": "rowwise",
    f"{MX}.recipe_name": "mxfp8_emulated",
    "quantize.grouped_mm.float8.recipe_name": "rowwise_with_gw_hp",
    "quantize.grouped_mm.mx.recipe_name": "mxfp8_emulated",
}
FILTERS = [f"--{FLOAT8}.filter_fqns=output", "--quantize.grouped_mm.float8.fqns=experts"]


@pytest.mark.parametrize("key", ASKED)
def test_a_section_that_no_converter_reads_is_told_once(key, capsys, monkeypatch):
    section = key.rpartition(".")[0]
    argv = [f"--{key}={ASKED[key]}", "--comm.mode=fake_backend", *FILTERS]
    monkeypatch.setattr(train, "dry_run", lambda *_: ())
    assert train.main(argv) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert "WARNING" in line and f"{key} is without effect: {section} is not in model.converters" in line
    assert train.main([*argv, f"--model.converters={section}"]) == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(argv) == 0
    assert not capsys.readouterr().err


def test_a_section_of_defaults_and_filters_asks_for_nothing():
    default = [f"--{FLOAT8}.no_enable_fsdp_float8_all_gather", f"--{MX}.recipe_name=mxfp8_cublas"]
    assert not converters.unused_sections(load(*FILTERS, *default))
    assert not converters.unused_sections(load("--model.converters=float8", f"--{FLOAT8}.emulate"))


def test_the_kernel_that_casts_along_columns_is_the_one_asked_for():
    model, _ = converted(f"--model.converters={MX}", f"--{MX}.mxfp8_dim1_cast_kernel_choice=torch")
    kinds = type(model.layers["0"].attention.wq.options[6])
    assert {layer.options[6] for layer in model.modules() if isinstance(layer, mx.MXLinear)} == {kinds.TORCH}


def test_a_line_tells_what_was_converted_and_what_was_left():
    filters = f"--{FLOAT8}.filter_fqns=output,attention.wk"
    _, [done] = converted("--model.converters=float8", filters, f"--{FLOAT8}.recipe_name=rowwise")
    assert str(done) == (
        "quantize.linear.float8 (rowwise): 36 of 43 Linear layers converted; "
        "left: 6 layers.*.attention.wk (filter), output (filter)"
    )


TP2 = "--parallelism.tensor_parallel_degree=2"
HEADS_LEFT = {
    "tied to the embedding": (FLOAT8, "--model.overrides.enable_weight_tying=true"),
    "widths must divide by 16": (FLOAT8, "--model.overrides.vocab_size=2040"),
    "tensor parallelism: the loss is computed in high precision": (FLOAT8, TP2),
    "the loss is computed in high precision": (MX, f"--{MX}.filter_fqns="),
    "filter": (FLOAT8, f"--{FLOAT8}.filter_fqns=output"),
}


@pytest.mark.parametrize("reason", HEADS_LEFT)
def test_a_head_is_left_where_that_is_said(reason):
    name, option = HEADS_LEFT[reason]
    model, [done] = converted(f"--model.converters={name}", option)
    assert done.left == {"output": reason}
    assert model.output.loss is chunked_linear_cross_entropy


def test_one_process_leaves_the_head_that_tensor_parallelism_leaves():
    for option, left in ((TP2, True), ("--parallelism.data_parallel_shard_degree=2", False)):
        case = alone(settle(load("--model.converters=float8", option), full=False))
        with torch.device("meta"):
            [done] = convert(case.model_config.build(), case.config)
        assert ("output" in done.left) == left


def test_widths_that_kernels_do_not_take_are_left_and_named():
    argv = ["--model.overrides.ffn_dim=776", "--model.converters"]
    _, [done] = converted(*argv, FLOAT8)
    assert len(done.converted) == 24 + 1
    assert done.left["layers.3.feed_forward.w2"] == "widths must divide by 16"
    _, [done] = converted("--model.overrides.ffn_dim=784", argv[1], MX)
    assert done.left["layers.3.feed_forward.w2"] == "widths must divide by 32"


def test_layers_too_small_to_gain_are_left_where_that_is_asked_for():
    argv = ["--model.flavor=8B", "--model.overrides.n_layers=1", "--model.converters=float8"]
    _, [done] = converted(*argv, f"--{FLOAT8}.filter_fqns=auto_filter_small_kn")
    small = {name for name, reason in done.left.items() if reason == "too small to gain"}
    assert small == {"layers.0.attention.wk", "layers.0.attention.wv"} and "output" in done.converted
    _, [done] = converted(*argv, "--model.overrides.vocab_size=1024", f"--{FLOAT8}.filter_fqns=auto_filter_small_kn")
    assert done.left["output"] == "too small to gain"


def test_a_filter_of_everything_is_refused():
    [fault] = refused("--model.converters=float8", f"--{FLOAT8}.filter_fqns=layers,output")
    assert fault.startswith("quantize.linear.float8.filter_fqns: leaves quantize.linear.float8 none of ")
    assert "6 layers.*.attention.wq (filter)" in fault


def test_a_filter_of_nothing_is_refused_with_the_nearest_name():
    faults = refused(f"--model.converters={FLOAT8}", f"--{FLOAT8}.filter_fqns=atention,wz")
    assert 'filter_fqns = "atention": is in the name of no module. Did you mean "attention"?' in faults[0]
    assert 'filter_fqns = "wz": is in the name of no module.' in faults[1]


def test_unknown_recipes_are_refused_with_those_there_are():
    [fault] = refused(f"--model.converters={MX}", f"--{MX}.recipe_name=mxfp8_cubals")
    assert 'Did you mean "mxfp8_cublas"? Known: mxfp8_cublas, mxfp8_cublas_rceil,' in fault


@pytest.mark.parametrize(
    ("seq_len", "more", "pads"),
    [
        (16, [], False),
        (17, [], True),
        (16, ["--parallelism.tensor_parallel_degree=2"], True),
        (32, ["--parallelism.tensor_parallel_degree=2"], False),
        (16, ["--parallelism.context_parallel_degree=2"], True),
        (8, ["--training.local_batch_size=2"], False),
        (8, ["--training.local_batch_size=2", "--parallelism.pipeline_parallel_degree=2"], True),
    ],
)
def test_tokens_are_padded_where_float8_products_over_them_need_it(seq_len, more, pads):
    argv = ["--training.local_batch_size=1", f"--training.seq_len={seq_len}", *more]
    model, _ = converted(*argv, f"--model.converters={FLOAT8}")
    assert model.layers["0"].attention.wq.config.pad_inner_dim == pads


@pytest.mark.parametrize(("shards", "expected"), [(2, 0), (3, 1)])
def test_float8_is_gathered_where_shards_are_even(shards, expected):
    """Torch would raise on the ranks with the short shards, and leave the others waiting."""
    config = load(f"--{FLOAT8}.emulate", f"--{FLOAT8}.enable_fsdp_float8_all_gather")
    degrees = Degrees(dp_replicate=1, dp_shard=shards, tp=1)
    widths = {"layers.0.attention.wq": (256, 64), "output": (2048, 64)}
    faults = list(float8.layout_faults(config, widths, degrees))
    assert len(faults) == expected
    assert all("do not: 256 rows of layers.*.attention.wq" in fault.reason for fault in faults)


def test_what_rounds_can_be_emulated_and_left_out():
    config = load(f"--model.converters={FLOAT8},{MX}", f"--{MX}.recipe_name=mxfp8_rceil")
    assert emulated(config).quantize.linear.float8.emulate
    assert emulated(config).quantize.linear.mx.recipe_name == "mxfp8_emulated_rceil"
    assert exact(config).model.converters == []


OWN = "tests.unit_tests.quantization.own_converter"


def test_a_users_own_converter_is_known_after_the_custom_import():
    config = load("--model.converters=test.half", f"--experimental.custom_import={OWN}")
    model, faults = preflight.checked_model(config)
    assert not faults
    with torch.device("meta"):
        [done] = convert(model.build(), config)
    assert str(done) == "test.half: 1 of 1 modules converted"
    assert exact(config) == config and emulated(config) == config
    misspelt = replace(config, model=replace(config.model, converters=["test.hlaf"]))
    [fault] = converters.unknown_converters(misspelt)
    assert str(fault) == 'model.converters = "test.hlaf": no such name. Did you mean "test.half"?'


@pytest.mark.parametrize(
    ("model", "first", "second"),
    [
        ("llama3", FLOAT8, MX),
        ("qwen3", "quantize.grouped_mm.float8", "quantize.grouped_mm.mx"),
    ],
)
def test_what_one_converter_has_made_another_leaves(model, first, second):
    flavor = "debugmodel" if model == "llama3" else "debugmodel_moe"
    argv = [f"--model.name={model}", f"--model.flavor={flavor}", f"--model.converters={first},{second}"]
    argv += [f"--{name}.fqns=experts" for name in (first, second) if "grouped" in name]
    [fault] = refused(*argv)
    assert second in fault and "converted already" in fault


@pytest.mark.parametrize("key", ["quantize.grouped_mm.float8.fqns", "quantize.linear.float8.filter_fqns"])
def test_nothing_is_no_pattern(key):
    """It would be in every name."""
    argv = ["--model.name=qwen3", "--model.flavor=debugmodel_moe", f"--model.converters={key.rpartition('.')[0]}"]
    if "linear" in key:
        assert converted(*argv, f"--{key}=")[1] == converted(*argv)[1]
    else:
        assert "none of the model's MoE layers' experts" in refused(*argv, f"--{key}=")[0]


def test_the_oracles_small_model_is_converted_whatever_the_filters_of_the_large_one():
    filters = "output,auto_filter_small_kn,layers.31."
    argv = ["--model.flavor=8B", "--model.converters=float8", f"--{FLOAT8}.recipe_name=rowwise"]
    case = settle(load(*argv, f"--{FLOAT8}.filter_fqns={filters}"), full=False)
    assert case.config.quantize.linear.float8.filter_fqns == ["output"]
    assert any("filter_fqns" in note for note in case.settled)
    with torch.device("meta"):
        [done] = convert(case.model_config.build(), case.config)
    assert done.converted


def test_the_oracles_one_process_exchanges_nothing():
    argv = ["--model.name=qwen3", "--model.flavor=debugmodel_moe", "--parallelism.expert_parallel_degree=2"]
    argv += ["--model.converters=quantize.grouped_mm.float8", "--quantize.grouped_mm.float8.fqns=experts"]
    case = alone(settle(load(*argv, "--quantize.grouped_mm.float8.exchange_in_float8"), full=False))
    with torch.device("meta"):
        [done] = convert(case.model_config.build(), case.config)
    assert done.converted
