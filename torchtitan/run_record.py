"""What a run settles when it starts, and writes down: its config files, and the head of its log."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchtitan.config.schema import JobConfig, Training
from torchtitan.config.toml_file import save_toml, to_json
from torchtitan.distributed.fsdp import Precision
from torchtitan.distributed.mesh import Degrees
from torchtitan.model_parts import ModelParts
from torchtitan.optim.optimizer import AnyOptimizer, describe_optimizer
from torchtitan.optim.schedule import describe_schedule
from torchtitan.preflight import Setup


def resolved_config(setup: Setup) -> JobConfig:
    """The config with what was left open: the seed, the same on all ranks, and the batch size."""
    seed = [setup.config.debug.seed]
    if seed[0] is None:
        seed[0] = setup.progress.get("seed", random.SystemRandom().getrandbits(31))
    dist.broadcast_object_list(seed)
    return replace(
        setup.config,
        debug=replace(setup.config.debug, seed=seed[0]),
        training=replace(setup.config.training, global_batch_size=setup.global_batch_size),
    )


def save_config(config: JobConfig) -> None:
    """Write config.toml, from which this very run can be started again; JSON where asked for."""
    dump_folder = Path(config.job.dump_folder)
    save_toml(config, dump_folder / "config.toml")
    if config.job.save_config_file is not None:
        path = dump_folder / config.job.save_config_file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(config))


def moved_data(training: Training, before: Mapping[str, Any]) -> str:
    """A warning where a run reads on from a position in data of another name; else nothing.

    `before` is the table of training that the checkpoint was made with.
    """
    tables = before, asdict(training)
    there, here = ([table["dataset"], table["dataset_path"]] for table in tables)
    if there == here:
        return ""
    was, now = (" at ".join(str(name) for name in names if name) for names in (there, here))
    return (
        f"the checkpoint's data position is one in {was}, and this run reads {now} from there on: right if "
        "that is the same data. checkpoint.exclude_from_loading = ['dataloader'] begins the data anew."
    )


def describe(
    config: JobConfig,
    degrees: Degrees,
    precision: Precision,
    model: ModelParts,
    optimizer: AnyOptimizer,
) -> Iterator[str]:
    """What is trained and on what, in a few lines; `config` has its seed and batch size settled."""
    if config.job.print_config:
        yield to_json(config)
    yield config.job.description
    yield (
        f"{config.model.name} {config.model.flavor}: {model.num_parameters:,} parameters, "
        f"stored in {precision.store}, computed in {precision.compute}, gradients reduced in "
        f"{precision.reduce}"
    )
    yield from map(str, model.conversions)
    if rows := config.moe.max_rows_per_chunk:
        yield f"experts work on {rows} rows at a time: less memory, and slower"
    names = [*(["pp"] if degrees.pp > 1 else []), "dp_replicate", "dp_shard"]
    names += [*(["cp"] if degrees.cp > 1 else []), "tp", *(["ep", "etp"] if degrees.ep > 1 else [])]
    axes = ", ".join(f"{axis} {getattr(degrees, axis)}" for axis in names)
    training = config.training
    yield (
        f"{dist.get_world_size()} ranks on {model.device.type}: {axes}; {training.global_batch_size} "
        f"sequences of {training.seq_len} tokens a step; seed {config.debug.seed}"
    )
    yield describe_optimizer(optimizer)
    yield describe_schedule(config.optimizer.lr, config.lr_scheduler, training.steps)
