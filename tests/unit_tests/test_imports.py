"""Does every module import only what it may see, and a plain start nothing heavy?"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "torchtitan"
LEAVES = {"config", "logging", "sequence_part", "sharding", "weight_map", "ops"}
LEAVES |= {"routing", "routing_decisions"}
MESH = {"distributed.mesh", "distributed.comm", "distributed.local_parts"}
"""What parts beside `distributed` may know of it: where a rank stands among the others."""
MAY_IMPORT = {
    "models": LEAVES,
    "distributed": LEAVES,
    "data": LEAVES | MESH,
    "optim": LEAVES | MESH | {"distributed.cast_copy"},
    "checkpoint": LEAVES | MESH,
    "quantization": LEAVES | MESH,
    "observability": LEAVES | MESH,
    "checkpoint.hf": LEAVES | MESH | {"models.registry", "models.hf_format"},
    "checkpoint.hf_export": LEAVES | MESH | {"models.registry", "models.hf_format"},
    **{leaf: {"logging"} for leaf in LEAVES},
    "routing": {"ops"},
    "routing_decisions": {"routing"},
}
HEAVY = ["torchao", "datasets", "wandb", "transformers", "tensorboard", "torchvision", "pandas"]
HEAVY += ["huggingface_hub", "torch._inductor.compile_fx", "torch.testing._internal.common_utils"]


def _imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, at its top or in a function, without 'torchtitan.'."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (n.removeprefix("torchtitan.") for n in names if n.startswith("torchtitan."))


def _covers(allowed: set[str], name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in allowed)


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_down(part):
    folder = PACKAGE / part.replace(".", "/")
    files = [*folder.rglob("*.py"), *folder.parent.glob(f"{folder.name}.py")]
    for path in files:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        allowed = MAY_IMPORT.get(module, MAY_IMPORT[part]) | {part.split(".")[0]}
        wrong = [name for name in _imports(path) if not _covers(allowed, name)]
        assert not wrong, f"{module} must not import {wrong}"


def test_every_folder_has_its_rule():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= MAY_IMPORT.keys()


@pytest.mark.parametrize(
    "module, unwanted", [("torchtitan.train", HEAVY), ("torchtitan.config.manager", ["torch"])]
)
def test_a_plain_start_loads_nothing_heavy(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
