"""Is what the code imports what an installation brings, on a PyTorch that is said to work?"""

import ast
import re
import sys
from pathlib import Path

import tomli
import torch

REPO = Path(__file__).parents[2]
PROJECT = tomli.loads((REPO / "pyproject.toml").read_text())["project"]
OPTIONAL = {"datasets", "wandb", "deep_ep"}
"""Imported in the one function that needs them, which says what to install where they are missing."""
OF_TORCH = {"torch", "triton", "typing_extensions"}


def roots(nodes):
    """Top-level packages that import statements among the nodes name."""
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (name.partition(".")[0] for name in names)


def test_an_installation_brings_all_that_is_imported():
    named = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in PROJECT["dependencies"]}
    brought = named | OF_TORCH | {"torchtitan"} | set(sys.stdlib_module_names)
    for path in (REPO / "torchtitan").rglob("*.py"):
        tree = ast.parse(path.read_text())
        at_the_top, anywhere = set(roots(tree.body)), set(roots(ast.walk(tree)))
        assert at_the_top <= brought and anywhere <= brought | OPTIONAL, path


def test_this_torch_is_in_the_range_that_installs_and_that_the_readme_names():
    [torch_range] = [line for line in PROJECT["dependencies"] if line.startswith("torch>")]
    least, below = re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", torch_range).groups()
    assert int(least) <= int(torch.__version__.split(".")[1]) < int(below)
    assert f"(2.{least} to 2.{int(below) - 1})" in (REPO / "README.md").read_text()
