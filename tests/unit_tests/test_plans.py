"""Plans are strict in both directions, and a changed layout shows in a golden file."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from scripts.show_plan import plan_of
from torchtitan.config.schema import JobConfig, Model
from torchtitan.distributed.plan import styles_of
from torchtitan.models.llama3 import FLAVORS
from torchtitan.models.registry import families, model_config
from torchtitan.sharding import ParallelPlan, Rule, Style

GOLDEN = Path(__file__).parents[1] / "golden" / "plans"
CASES = [
    (family, flavor)
    for family in families()
    for flavor in import_module(f"torchtitan.models.{family}").FLAVORS
]


@pytest.mark.parametrize(("family", "flavor"), CASES)
def test_plans_are_as_recorded(family, flavor):
    """After a wanted change: python scripts/show_plan.py --model.name F --model.flavor X > FILE."""
    recorded = (GOLDEN / f"{family}_{flavor}.txt").read_text().rstrip("\n")
    assert plan_of(JobConfig(model=Model(name=family, flavor=flavor))) == recorded


def small():
    with torch.device("meta"):
        return replace(FLAVORS["debugmodel"], n_layers=2).build()


def test_a_parameter_without_a_rule_is_named():
    model = small()
    model.layers["1"].extra = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(AssertionError, match=r"layers\.1\.extra\.weight has 0 rules"):
        styles_of(model.parallel_plan(), model)


def test_a_rule_without_a_module_is_named():
    model = small()
    plan = model.parallel_plan()
    plan = replace(plan, rules=(*plan.rules, Rule("layers.*.gone", Style.COLWISE)))
    with pytest.raises(AssertionError, match=r"layers\.\*\.gone \(colwise\) matches no module"):
        styles_of(plan, model)


def test_two_rules_for_a_parameter_are_named():
    model = small()
    plan = model.parallel_plan()
    plan = replace(plan, rules=(*plan.rules, Rule("layers.*.attention.wq", Style.ROWWISE)))
    with pytest.raises(AssertionError, match=r"layers\.0\.attention\.wq\.weight has 2 rules"):
        styles_of(plan, model)


def test_an_fsdp_unit_that_is_not_a_module_is_named():
    model = small()
    plan = ParallelPlan(model.parallel_plan().rules, (("layers.0", "gone"),))
    with pytest.raises(AssertionError, match="FSDP unit gone is not a module"):
        styles_of(plan, model)


def test_every_style_is_used():
    styles = set()
    for family, flavor in [("llama3", "8B"), ("deepseek_v3", "16B"), ("olmo2", "7B")]:
        with torch.device("meta"):
            plan = model_config(family, flavor, {}).build().parallel_plan()
        styles |= {rule.style for rule in plan.rules}
    assert styles == set(Style)
