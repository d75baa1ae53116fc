"""What the docs' examples import is there, and takes the arguments that they give: others build on it."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = [
    pytest.param(text, id=f"{path.stem}-{number}")
    for path in sorted(DOCS.glob("*.md"))
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_fit_the_code(text):
    nodes = list(ast.walk(ast.parse(text)))
    public = {
        alias.name: getattr(import_module(node.module), alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module.startswith("torchtitan")
        for alias in node.names
    }
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        if function := public.get(getattr(call.func, "id", None)):
            keywords = {keyword.arg: None for keyword in call.keywords}
            inspect.signature(function).bind(*call.args, **keywords)


def test_there_are_examples():
    assert sum("from torchtitan" in example.values[0] for example in EXAMPLES) >= 4
