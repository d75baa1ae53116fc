"""Prints how a config's model is spread: `python scripts/show_plan.py --job.config_file X [overrides]`."""

import sys

import torch

from torchtitan.config.faults import EXIT_CONFIG, ConfigError
from torchtitan.config.manager import load_config
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.plan import describe
from torchtitan.models.registry import model_config
from torchtitan.preflight import report


def plan_of(config: JobConfig) -> str:
    """The plan of a config's model, as text; needs no ranks and no memory for weights."""
    flavor = model_config(config.model.name, config.model.flavor, config.model.overrides)
    with torch.device("meta"):
        model = flavor.build()
    return "\n".join(describe(model.parallel_plan(), model))


def main(argv: list[str]) -> int:
    try:
        print(plan_of(load_config(argv)))
    except ConfigError as error:
        report(error, argv)
        return EXIT_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
