"""Settings by name: which parameter has which, what a table changes, and tables that mean nothing."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from torchtitan.config.faults import ConfigError
from torchtitan.config.schema import Optimizer
from torchtitan.models.registry import families, model_config
from torchtitan.optim.check import check_optimizer, check_saved_state
from torchtitan.optim.groups import Settings
from torchtitan.optim.optimizer import build_optimizer, describe_optimizer, set_learning_rate

CONFIG = Optimizer(lr=0.5, weight_decay=0.25)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"norm": nn.LayerNorm(4), "wq": nn.Linear(4, 4)})
    return nn.ModuleDict({"tok_embeddings": nn.Embedding(8, 4), "layers": nn.ModuleList([layer])})


NUM_DIMS = {name: param.ndim for name, param in make_model().named_parameters()}


def settings(config):
    """(weight decay, learning rate) of each parameter."""
    optimizer = build_optimizer(make_model().named_parameters(), config)
    return {
        name: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def refused(config):
    with pytest.raises(ConfigError) as error:
        check_optimizer(config, NUM_DIMS)
    return error.value.faults


def test_the_first_table_that_matches_counts_and_one_without_decay_leaves_it():
    tables = [
        {"patterns": "*norm*", "lr_scale": 0.5},
        {"patterns": ["tok_embeddings.*", "*norm.weight"], "weight_decay": 0.75, "lr_scale": 2},
    ]
    config = replace(CONFIG, groups=tables, no_decay=["*.bias", "tok_embeddings.*"])
    check_optimizer(config, NUM_DIMS)
    without = [{"patterns": "*", "weight_decay": 0.0}]
    assert {decay for decay, _ in settings(replace(config, groups=without)).values()} == {0.0}
    assert settings(config) == {
        "tok_embeddings.weight": (0.75, 1.0),
        "layers.0.norm.weight": (0.25, 0.25),
        "layers.0.norm.bias": (0.0, 0.25),
        "layers.0.wq.weight": (0.25, 0.5),
        "layers.0.wq.bias": (0.0, 0.5),
    }


def test_the_schedule_is_scaled_and_a_scale_of_zero_leaves_weights_as_they_are():
    model = make_model()
    tables = [{"patterns": "*wq*", "lr_scale": 0.0}, {"patterns": "*.norm.*", "lr_scale": 0.5}]
    optimizer = build_optimizer(model.named_parameters(), replace(CONFIG, groups=tables))
    assert describe_optimizer(optimizer) == (
        "AdamW: 1 tensors (32 parameters) with weight decay 0.25, "
        "2 tensors (8 parameters) with weight decay 0.25 and 0.5 times the learning rate, "
        "2 tensors (20 parameters) with weight decay 0.25 and 0 times the learning rate"
    )
    set_learning_rate(optimizer, 1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3, 0.0]
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    same = {name for name, param in model.named_parameters() if torch.equal(param, before[name])}
    assert same == {"layers.0.wq.weight", "layers.0.wq.bias"}


@pytest.mark.parametrize("family", families())
def test_muon_takes_the_matrices_inside_of_layers(family):
    model = model_config(family, "debugmodel_moe" if family == "qwen3" else "debugmodel", {})
    with torch.device("meta"):
        named = dict(model.build().named_parameters())
    config = Optimizer(name="Muon")
    chosen = {name: Settings.of(name, param.ndim, config, []).optimizer for name, param in named.items()}
    by_kind = {re.sub(r"^layers\.\d+\.", "", name): optimizer for name, optimizer in chosen.items()}
    muons = {kind for kind, optimizer in by_kind.items() if optimizer == "Muon"}
    assert muons <= {
        *(f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo", "wq_a", "wq_b", "wkv_a", "wkv_b")),
        *(f"{where}.{name}.weight" for where in ("feed_forward", "moe.shared_experts") for name in ("w1", "w2", "w3")),
        "moe.experts.w13",
        "moe.experts.w2",
    }  # fmt: skip
    matrices = {re.sub(r"^layers\.\d+\.", "", name) for name, param in named.items() if param.ndim > 1}
    assert matrices - muons <= {
        "tok_embeddings.weight", "output.weight", "moe.router.gate.weight", "moe.experts.b13", "moe.experts.b2",
    }  # fmt: skip


def test_tables_choose_between_muon_and_adamw():
    tables = [
        {"patterns": "*.wq.*", "optimizer": "AdamW", "weight_decay": 0.5},
        {"patterns": "tok_*", "optimizer": "Muon"},
    ]
    config = replace(CONFIG, name="Muon", groups=tables)
    optimizer = build_optimizer(make_model().named_parameters(), config)
    assert describe_optimizer(optimizer) == (
        "Muon: 1 tensors (32 parameters) with weight decay 0.25; "
        "AdamW: 2 tensors (8 parameters) with weight decay 0.25, 2 tensors (20 parameters) with weight decay 0.5"
    )
    (fault,) = refused(replace(config, groups=[{"patterns": "*norm*", "optimizer": "Muon"}]))
    assert str(fault).startswith(
        'optimizer.groups[0].optimizer = "Muon": updates matrices, and layers.0.norm.weight is none.'
    )


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names():
    tables = [{"patterns": ["*.wq.*", "*.wqq.*"], "lr_scale": 2.0}]
    faults = refused(replace(CONFIG, no_decay=["*.norm.wieght", "*.bias"], groups=tables))
    assert [(fault.setting, fault.value) for fault in faults] == [
        ("optimizer.no_decay", "*.norm.wieght"),
        ("optimizer.groups[0].patterns", "*.wqq.*"),
    ]
    assert "layers.*.norm.weight" in faults[0].remedy and "layers.*.wq.weight" in faults[1].remedy


def test_a_table_behind_others_that_leave_it_nothing_is_refused():
    tables = [{"patterns": "layers.*", "lr_scale": 0.5}, {"patterns": "*norm*", "weight_decay": 0.0}]
    (fault,) = refused(replace(CONFIG, groups=tables))
    assert fault.setting == "optimizer.groups[1].patterns"
    check_optimizer(replace(CONFIG, groups=tables[::-1]), NUM_DIMS)


def test_a_stage_of_a_pipeline_need_not_have_what_a_pattern_matches():
    config = replace(CONFIG, no_decay=["output.*"], groups=[{"patterns": "output.*", "lr_scale": 2.0}])
    build_optimizer(make_model().named_parameters(), config)


def test_state_of_another_optimizer_is_refused():
    adams = {f"optimizer.{name}.{key}" for name in NUM_DIMS for key in ("step", "exp_avg", "exp_avg_sq")}
    for name in ("Adam", "AdamW", "AdamW8bit"):
        check_saved_state(Optimizer(name=name), NUM_DIMS, adams, "step-2")
    with pytest.raises(ConfigError, match=r"no optimizer\.layers\.0\.wq\.weight\.momentum_buffer.*exclude_from"):
        check_saved_state(Optimizer(name="Muon"), NUM_DIMS, adams, "step-2")
    muons = adams | {"optimizer.layers.0.wq.weight.momentum_buffer"}
    muons -= {name for name in muons if "wq.weight.exp" in name}
    check_saved_state(Optimizer(name="Muon"), NUM_DIMS, muons, "step-2")
    with pytest.raises(ConfigError, match="another optimizer"):
        check_saved_state(CONFIG, NUM_DIMS, muons, "step-2")
