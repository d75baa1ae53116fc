"""What does the schema know that the code does not do yet? One row a feature, refused by name."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchtitan.config.extensions import UPSTREAM_PARTS
from torchtitan.config.faults import Fault
from torchtitan.config.names import leaf_keys
from torchtitan.config.schema import JobConfig

PLANNED = "planned"
OUT_OF_SCOPE = "out of scope for now"


@dataclass(frozen=True)
class NotBuilt:
    """A feature, the switches that ask for it, and the settings that mean nothing without it."""

    feature: str
    status: str
    switches: tuple[str, ...]
    """Keys that are refused where they differ from their default."""
    settings: tuple[str, ...] = ()
    """Keys, or sections, without effect while the switches are off: accepted whatever they say."""
    refused: tuple[Any, ...] | None = None
    """The values refused; None is every value but the default."""
    instead: str = ""
    """What serves in its place."""


NOT_BUILT = (
    NotBuilt(
        "balancing by what a mask makes of each block of queries",
        OUT_OF_SCOPE,
        ("parallelism.context_parallel_load_balancer",),
        refused=("ptrr",),
    ),
    NotBuilt("the optimizer step in backward", PLANNED, ("optimizer.early_step_in_backward",)),
    NotBuilt("simulating ranks in one process", OUT_OF_SCOPE, ("comm.mode",), refused=("local_tensor",)),
    NotBuilt(
        "memory estimation",
        PLANNED,
        ("memory_estimation.enable",),
        ("memory_estimation.disable_fake_mode",),
        instead="A dry run predicts memory: COMM_MODE=fake_backend ./run_train.sh.",
    ),
    NotBuilt(
        "this model family",
        OUT_OF_SCOPE,
        ("model.name",),
        refused=(
            "flux",
            "llama3_ft",
            "vlm",
            "transformers_modeling_backend",
            "simple_fsdp.llama3",
            "simple_fsdp.deepseek_v3",
            "compiler_toolkit.llama3",
            "compiler_toolkit.deepseek_v3",
            "autoparallel.llama3",
            "autoparallel.deepseek_v3",
        ),
    ),
    NotBuilt(
        "this upstream module",
        OUT_OF_SCOPE,
        ("job.custom_config_module",),
        refused=tuple(UPSTREAM_PARTS),
    ),
    NotBuilt("the transformers backend", OUT_OF_SCOPE, ("hf_transformers.model",)),
    NotBuilt(
        "TorchFT",
        OUT_OF_SCOPE,
        ("fault_tolerance.enable", "checkpoint.enable_ft_dataloader_checkpoints"),
        ("fault_tolerance",),
    ),
)
"""Whoever builds a feature deletes its row here and in docs/configuration.md (a test compares)."""


def refusals(config: JobConfig) -> Iterator[Fault]:
    """A fault for every key that asks for a feature that is not built."""
    values, defaults = leaf_keys(config), leaf_keys(JobConfig)
    for row in NOT_BUILT:
        for key in row.switches:
            value, default = values[key], defaults[key]
            given = value if isinstance(value, list) and row.refused else [value]
            for one in given:
                if one in row.refused if row.refused else one != default:
                    reason = f"{row.feature} is not built ({row.status})."
                    remedy = f"Use {json.dumps(default)}. {row.instead}".rstrip()
                    yield Fault(key, reason, remedy, one)
