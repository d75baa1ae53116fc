"""The schema is complete and alive: every key documented, and read or refused by the code."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchtitan
from torchtitan.config.names import leaf_keys
from torchtitan.config.not_built import NOT_BUILT
from torchtitan.config.schema import JobConfig

PACKAGE = Path(torchtitan.__file__).parent
KEYS = leaf_keys(JobConfig)


def sections(section: type = JobConfig) -> Iterator[type]:
    yield section
    for key in dataclasses.fields(section):
        if dataclasses.is_dataclass(key.type):
            yield from sections(key.type)


SECTIONS = list(dict.fromkeys(sections()))


def test_upstreams_149_keys_and_ours():
    ours = {
        "checkpoint.max_run_seconds",
        "debug.batch_invariant",
        "model.overrides",
        "moe.experts_backend",
        "moe.global_balance_coeff",
        "moe.max_rows_per_chunk",
        "moe.router_z_coeff",
        "moe.sequence_balance_coeff",
        "optimizer.bf16_stochastic_round",
        "optimizer.groups",
        "optimizer.muon_lr_adjustment",
        "optimizer.muon_momentum",
        "optimizer.no_decay",
        "parallelism.context_parallel_method",
        "parallelism.enable_sequence_parallel",
        "parallelism.symmetric_memory_capacity_factor",
        "quantize.grouped_mm.float8.emulate",
        "quantize.grouped_mm.float8.exchange_in_float8",
        "quantize.grouped_mm.float8.recipe_name",
        "training.max_skipped_steps",
        "training.on_nonfinite",
        "training.repeat",
        "training.shuffle",
        "training.sync_gradients_each_microbatch",
        "hf_transformers.model",
    }
    assert ours < set(KEYS)
    assert len(set(KEYS) - ours) == 149


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_has_a_docstring_and_the_section_is_frozen(section):
    tree = ast.parse(
        Path(PACKAGE.parent, *section.__module__.split(".")).with_suffix(".py").read_text()
    )
    (body,) = [
        n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == section.__name__
    ]
    for field, after in zip(body, [*body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value.value, str), (
                field.target.id
            )
            assert after.value.value.endswith("."), field.target.id
    assert section.__dataclass_params__.frozen


@dataclasses.dataclass(frozen=True)
class Source:
    """Attributes a file reads, as (owner, name), and every name it mentions."""

    attributes: set[tuple[str, str]]
    names: set[str]

    def reads(self, section: str, class_name: str, name: str) -> bool:
        """`x.section.name`, or `x.name` in a file that has that section to hand."""
        if (section, name) in self.attributes:
            return True
        to_hand = class_name in self.names or section in {name for _, name in self.attributes}
        return to_hand and name in {name for _, name in self.attributes}


def read(path: Path) -> Source:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = {
        (getattr(n.value, "attr", getattr(n.value, "id", "")), n.attr)
        for n in nodes
        if isinstance(n, ast.Attribute)
    }
    names = {alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    return Source(attributes, names)


def class_of(section: str) -> str:
    config: object = JobConfig()
    for name in section.split("."):
        config = getattr(config, name)
    return type(config).__name__


READERS_IN_CONFIG = (
    "manager.py",
    "optimizer_groups.py",
    "pipeline.py",
    "pipeline_faults.py",
    "sequence_cuts.py",
)
"""Files of config that do what keys say; the others only know them."""
SOURCES = [
    read(path)
    for path in sorted(PACKAGE.rglob("*.py"))
    if "config" not in path.relative_to(PACKAGE).parts[:1] or path.name in READERS_IN_CONFIG
]
UNBUILT = tuple(key for row in NOT_BUILT for key in (*row.switches, *row.settings))
PARTLY_BUILT = {key for row in NOT_BUILT if row.refused for key in row.switches}
BUILT = [
    key
    for key in KEYS
    if key not in {*UNBUILT} - PARTLY_BUILT
    and not key.startswith(tuple(f"{section}." for section in UNBUILT))
    and key != "job.config_file"  # read as an option, before there is a config
]


@pytest.mark.parametrize("key", BUILT)
def test_every_key_is_read_or_refused(key):
    section, _, name = key.rpartition(".")
    owner = section.rpartition(".")[2]
    assert any(source.reads(owner, class_of(section), name) for source in SOURCES), (
        f"nothing in torchtitan reads {key}: use it, or refuse it in config/not_built.py"
    )
