"""Checks everything about a run that can be known before a process group starts.

`python -m torchtitan.preflight <arguments>` is what run_train.sh runs first, in one process: it lists
every fault at once and exits with status 2, or says nothing. The trainer starts from its result.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from torchtitan.checkpoint.find import Progress, find_checkpoint, is_own, own_folder
from torchtitan.checkpoint.fit import (
    check_hugging_face,
    check_weights,
    progress_taken_over,
    resumed_batch_size,
    saved_tensors,
    takes_optimizer,
)
from torchtitan.checkpoint.hf_run import HuggingFace
from torchtitan.checkpoint.manager import find_altered
from torchtitan.config.bounds import is_positive_count
from torchtitan.config.checks import check_config
from torchtitan.config.faults import EXIT_CONFIG, ConfigError, Fault, with_place
from torchtitan.config.manager import load_config, located
from torchtitan.config.names import unknown_value
from torchtitan.config.schema import Checkpoint, Compile, JobConfig, Training, Validation
from torchtitan.data.datasets import open_sources, parse_dataset
from torchtitan.data.loader import position_faults
from torchtitan.data.source import Dealing
from torchtitan.data.tokenizer import Tokenizer, build_tokenizer, check_tokenizer
from torchtitan.distributed.async_tensor_parallel import check_async_tensor_parallel
from torchtitan.distributed.comm import World, pick_device
from torchtitan.distributed.expert_parallel.dispatchers import check_comm_backend
from torchtitan.distributed.mesh import Degrees
from torchtitan.distributed.plan import styles_of
from torchtitan.distributed.styles import local_widths
from torchtitan.logging import init_logger
from torchtitan.models.decoder import DecoderConfig
from torchtitan.models.registry import model_config
from torchtitan.observability.profiling import check_memory_snapshot
from torchtitan.observability.sinks import check_sinks
from torchtitan.optim.check import check_optimizer, check_saved_state
from torchtitan.quantization.converters import (
    check_device,
    check_layout,
    convert,
    unknown_converters,
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Setup:
    """What a run is made of, all of it checked."""

    config: JobConfig
    degrees: Degrees
    model_config: DecoderConfig
    tokenizer: Tokenizer
    checkpoint: Path | None
    """Where the run starts from, or None for newly drawn weights."""
    progress: Progress
    """How far that checkpoint is; empty for a new run."""
    global_batch_size: int
    hf: HuggingFace


def prepare(
    config: JobConfig,
    world_size: int,
    device: torch.device,
    altered: Mapping[Path, str] | None = None,
) -> Setup:
    """Resolve a config for `world_size` ranks; raises ConfigError with every fault there is.

    `altered` are checkpoints known to be damaged, each with what is wrong.
    """
    model, faults = checked_model(config)

    def attempt(function: Callable[..., Result], *args) -> Result | None:
        try:
            return function(*args)
        except ConfigError as error:
            faults.extend(_further(error, faults))
            return None

    attempt(_check_dump_folder, config.job.dump_folder)
    attempt(_check_compiler, config.compile)
    if not any(fault.setting == "model.converters" for fault in faults):
        attempt(check_device, config, device)
    attempt(check_sinks, config.metrics)
    attempt(check_memory_snapshot, config.profiling, device)
    attempt(check_async_tensor_parallel, config.parallelism, device)
    attempt(check_comm_backend, config, device, world_size)
    attempt(_check_saving, config.checkpoint, world_size, device)
    tokenizer = attempt(build_tokenizer, config.model.hf_assets_path)
    if model and tokenizer:
        faults += check_tokenizer(tokenizer, model.vocab_size)
    attempt(_check_data, config)
    dump_folder, assets = Path(config.job.dump_folder), Path(config.model.hf_assets_path)
    checkpoint = attempt(find_checkpoint, config.checkpoint, dump_folder, assets, altered, config)
    hf = model and HuggingFace(config.model.name, model, assets)
    progress: Progress | None = {}
    if checkpoint:
        own = is_own(checkpoint, own_folder(config.checkpoint, dump_folder))
        if hf:
            attempt(check_hugging_face, checkpoint, hf, config.checkpoint, own)
            if (checkpoint / ".metadata").exists():
                attempt(check_weights, checkpoint, model)
                attempt(_check_optimizer_state, checkpoint, model, config, own)
        num_steps = config.training.steps
        progress = attempt(progress_taken_over, checkpoint, config.checkpoint, own, num_steps)
    if hf and config.checkpoint.last_save_in_hf:
        attempt(hf.check_save)
    degrees = attempt(Degrees.resolve, config.parallelism, world_size)
    if model and degrees and config.model.converters and not faults:
        attempt(check_converted, model, config, degrees)
    batch_size = degrees and attempt(
        resumed_batch_size, config.training, degrees.dp, progress or {}
    )
    attempt(_check_data_position, config, progress or {})
    if faults:
        raise ConfigError(faults)
    return Setup(config, degrees, model, tokenizer, checkpoint, progress, batch_size, hf)


def checked_model(config: JobConfig) -> tuple[DecoderConfig | None, list[Fault]]:
    """The model of a config, if there can be one, and what is wrong with both.

    Raises ConfigError where there is no telling, for counts that all else divides by are none.
    """
    faults = list(check_config(config))
    if any(is_positive_count(fault.setting) for fault in faults):
        raise ConfigError(faults)
    if config.experimental.custom_import:
        faults += _import(config.experimental.custom_import)
    refused = [fault.value for fault in faults if fault.setting == "model.converters"]
    unknown = [fault for fault in unknown_converters(config) if fault.value not in refused]
    faults += unknown
    try:
        flavor = model_config(config.model.name, config.model.flavor, config.model.overrides)
        model = flavor.update_from_config(config)
        if config.model.converters and not refused and not unknown:  # each finds what to convert
            with torch.device("meta"):
                convert(model.build(), config)
    except ConfigError as error:
        return None, faults + _further(error, faults)
    try:
        check_optimizer(config.optimizer, _num_dims(model))
    except ConfigError as error:
        faults += _further(error, faults)
    return model, faults


def _further(error: ConfigError, faults: Sequence[Fault]) -> list[Fault]:
    """Its faults, without those of settings that are refused already: once, for the first reason."""
    known = {fault.setting for fault in faults}
    return [fault for fault in error.faults if fault.setting not in known]


def prepare_again(setup: Setup, world_size: int, device: torch.device) -> Setup:
    """The setup without checkpoints whose files were altered: they are read in full. Collective."""
    altered: dict[Path, str] = {}
    while what := find_altered(setup.checkpoint):
        altered[setup.checkpoint] = what
        setup = prepare(setup.config, world_size, device, altered)
    return setup


def _import(module: str) -> list[Fault]:
    """Import what may register models, losses or datasets of the user's own."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        remedy = "It must be importable from where the run is started (see PYTHONPATH)."
        return [Fault("experimental.custom_import", f"{error}.", remedy, value=module)]
    except Exception as error:  # whatever its code does
        return [Fault("experimental.custom_import", f"fails: {with_place(error)}.", value=module)]
    return []


def _check_dump_folder(dump_folder: str) -> None:
    """The folder, or what it would be made in, can be written to."""
    path = Path(dump_folder).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fault = Fault("job.dump_folder", f"cannot write to {there}.", value=dump_folder)
        raise ConfigError([fault])


def _check_compiler(config: Compile) -> None:
    if not config.enable:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if config.backend not in known:
        raise ConfigError([unknown_value("compile.backend", config.backend, known)])


def _check_saving(config: Checkpoint, world_size: int, device: torch.device) -> None:
    faults = []
    if config.create_seed_checkpoint and world_size > 1:
        reason = f"is written by one process, and there are {world_size} ranks."
        faults.append(Fault("checkpoint.create_seed_checkpoint", reason, "Set NGPU=1.", True))
    if config.async_mode == "async_with_pinned_mem" and device.type == "cpu":
        reason = "pinned memory speeds up copies from a GPU, and there is none."
        faults.append(Fault("checkpoint.async_mode", reason, 'Use "async".', config.async_mode))
    if faults:
        raise ConfigError(faults)


def _num_dims(model: DecoderConfig) -> dict[str, int]:
    """Of the model's parameters, by name."""
    with torch.device("meta"):
        return {name: parameter.ndim for name, parameter in model.build().named_parameters()}


def check_converted(model: DecoderConfig, config: JobConfig, degrees: Degrees) -> None:
    """What converters make can be split over the ranks there are."""
    with torch.device("meta"):
        whole = model.build()
    conversions, styles = convert(whole, config), styles_of(whole.parallel_plan(), whole)
    split_regions = not degrees.route_own_tokens(config.parallelism.enable_sequence_parallel)
    widths = {
        name: local_widths(module.weight.shape, styles[name], degrees.tp, split_regions)
        for name, module in whole.named_modules()
        if isinstance(module, nn.Linear)
    }
    check_layout(config, conversions, widths, degrees)


def _check_data(config: JobConfig) -> None:
    """Find and probe the data of training and validation, as a run with one sequence a batch would."""
    sections: list[tuple[str, Training | Validation]] = [("training", config.training)]
    if config.validation.enable:
        sections.append(("validation", config.validation))
    for name, section in sections:
        specs = parse_dataset(section.dataset, section.dataset_path, name)
        dealing = Dealing(num_slots=1, seed=0, shuffle=False)
        open_sources(specs, dealing, name, section.dataset_path)


def _check_optimizer_state(
    checkpoint: Path, model: DecoderConfig, config: JobConfig, own: bool
) -> None:
    if takes_optimizer(checkpoint, config.checkpoint, own):
        saved = saved_tensors(checkpoint)
        check_saved_state(config.optimizer, _num_dims(model), saved, checkpoint)


def _check_data_position(config: JobConfig, progress: Progress) -> None:
    """A resumed run reads on in the sources, and by the seed, that it began with."""
    if "slots" not in progress:
        return
    saved, seed = progress["seed"], config.debug.seed
    faults = []
    if seed not in (None, saved):
        reason = f"the checkpoint's data position belongs to seed {saved}."
        faults.append(Fault("debug.seed", reason, f"Use {saved}, or leave it unset.", seed))
    training, slots = config.training, progress["slots"]
    num_sources = len(parse_dataset(training.dataset, training.dataset_path))
    faults += position_faults(slots, progress["global_batch_size"], num_sources, "training")
    if faults:
        raise ConfigError(faults)


def world_size_asked_for() -> int:
    """NGPU ranks on each of NNODES nodes."""
    return int(os.environ.get("NGPU", 1)) * int(os.environ.get("NNODES", 1))


def is_dry_run(argv: Sequence[str]) -> bool:
    """Whether one process stands for all ranks; not where the config cannot be read."""
    try:
        return load_config(argv).comm.mode == "fake_backend"
    except ConfigError:
        return False


def main(argv: Sequence[str]) -> int:
    """Check a run of NGPU ranks on each of NNODES nodes; returns the exit status."""
    init_logger()
    try:
        prepare(load_config(argv), world_size_asked_for(), pick_device(World()))
    except ConfigError as error:
        report(error, argv)
        return EXIT_CONFIG
    return 0


def report(error: ConfigError, argv: Sequence[str]) -> None:
    """Print every fault, with the place its setting came from."""
    print("This run cannot start:", file=sys.stderr)
    print(ConfigError(located(error.faults, argv)), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
