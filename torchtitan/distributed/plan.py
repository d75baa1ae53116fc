"""Holds a model's plan against the model: strict in both directions, before anything is wrapped."""

import re
from collections.abc import Iterator

from torch import nn

from torchtitan.sharding import ParallelPlan, Rule, Style


def styles_of(plan: ParallelPlan, model: nn.Module) -> dict[str, Style]:
    """The style of every module that has one, by name.

    Raises AssertionError naming each rule that matches no module, each parameter whose module has no
    rule or more than one, and each FSDP unit that is not a module.
    """
    rules: dict[str, list[Rule]] = {name: [] for name, _ in model.named_modules()}
    problems = []
    for rule in plan.rules:
        matched = [name for name in rules if _matches(rule.pattern, name)]
        if not matched:
            problems.append(f"rule {rule.pattern} ({rule.style.value}) matches no module")
        for name in matched:
            rules[name].append(rule)
    for name, _ in model.named_parameters():
        patterns = [rule.pattern for rule in rules[name.rpartition(".")[0]]]
        if len(patterns) != 1:
            problems.append(f"parameter {name} has {len(patterns)} rules {patterns}")
    units = [name for unit in plan.fsdp_units for name in unit]
    problems += [f"FSDP unit {name} is not a module" for name in units if name not in rules]
    assert not problems, "; ".join(problems)
    return {name: matched[0].style for name, matched in rules.items() if matched}


def describe(plan: ParallelPlan, model: nn.Module) -> Iterator[str]:
    """The plan as a table, a line a rule and an FSDP unit; layers that are alike share a line."""
    styles = styles_of(plan, model)
    yield f"{'modules':44} {'style':14} weight"
    for rule in plan.rules:
        names = [name for name in styles if _matches(rule.pattern, name)]
        weights = model.get_submodule(names[0]).parameters(recurse=False)
        shapes = " + ".join("x".join(map(str, weight.shape)) for weight in weights) or "-"
        yield f"{rule.pattern:44} {rule.style.value:14} {shapes:32} x {len(names)}"
    yield ""
    yield "FSDP units, in forward order"
    previous, count = "", 0
    for unit in plan.fsdp_units:
        pattern = re.sub(r"\b\d+\b", "*", " + ".join(unit))
        if pattern != previous and previous:
            yield f"{previous:44} x {count}"
        count = count + 1 if pattern == previous else 1
        previous = pattern
    yield f"{previous:44} x {count}"
    yield f"{'(root) the rest':44} x 1"


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None
