"""How a run's larger parts are built from its config: its model on a mesh, data, metrics."""

from contextlib import AbstractContextManager
from dataclasses import asdict

import torch

from torchtitan.config.batch_size import global_batch_size
from torchtitan.config.pipeline import PipelinePlan
from torchtitan.config.schema import JobConfig, Training, Validation
from torchtitan.data.loader import DataConfig, Loader, build_loader
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.distributed.apply import parallelize
from torchtitan.distributed.comm import World
from torchtitan.distributed.fsdp import Precision, fill_parameters
from torchtitan.distributed.mesh import Degrees, Meshes
from torchtitan.distributed.pipeline import Hidden, Pipeline, TiedWeight
from torchtitan.logging import logger
from torchtitan.model_parts import ModelParts
from torchtitan.models.decoder import TIED_WEIGHT, Decoder, DecoderConfig
from torchtitan.models.flops import flops_per_token
from torchtitan.models.init import draw, parameter_inits
from torchtitan.observability.metrics import MetricsLogger, Workload
from torchtitan.quantization.conversion import Conversion
from torchtitan.quantization.converters import convert


def build_model(
    model_config: DecoderConfig,
    degrees: Degrees,
    precision: Precision,
    config: JobConfig,
    device: torch.device,
    fake: AbstractContextManager | None = None,
) -> ModelParts:
    """The model spread over all ranks, with the initial weights of config.debug.seed.

    In a dry run weights are tensors of the mode `fake`, without values.
    """
    meshes = degrees.meshes(device.type)
    whole, conversions = _on_meta(model_config, config)
    if config.model.print_after_conversion:
        logger.info(whole)
    num_parameters = sum(parameter.numel() for parameter in whole.parameters())
    if degrees.pp == 1:
        _spread(whole, degrees, meshes, precision, config, device, fake)
        return ModelParts([whole], None, None, num_parameters, conversions, device)
    plan = PipelinePlan(config, model_config.n_layers)
    group = meshes.dense["pp"].get_group()
    parts = []
    for stage in plan.stages_of(meshes.dense["pp"].get_local_rank()):
        part, _ = _on_meta(model_config, config)
        part.keep(plan.modules[stage])
        _spread(part, degrees, meshes, precision, config, device, fake)
        parts.append(part)
    sequence_parts = degrees.tp if config.parallelism.enable_sequence_parallel else 1
    hidden = Hidden(model_config.dim, precision.compute, sequence_parts)
    tied = None
    if model_config.enable_weight_tying:
        weights = (dict(part.named_parameters()).get(TIED_WEIGHT) for part in parts)
        ends = [weight for weight in weights if weight is not None]
        tied = TiedWeight(plan, group, ends)
    length = config.training.seq_len // degrees.cp
    pipeline = Pipeline(plan, parts, group, hidden, length, device)
    return ModelParts(parts, pipeline, tied, num_parameters, conversions, device)


def _on_meta(
    model_config: DecoderConfig, config: JobConfig
) -> tuple[Decoder, tuple[Conversion, ...]]:
    """The whole model, converted. A pipeline's stages are cut from it, so all ranks convert the same."""
    with torch.device("meta"):
        model = model_config.build()
    return model, convert(model, config)


def _spread(
    model: Decoder,
    degrees: Degrees,
    meshes: Meshes,
    precision: Precision,
    config: JobConfig,
    device: torch.device,
    fake: AbstractContextManager | None,
) -> None:
    """Spread a model or a stage of it over its ranks, and draw their parts of the weights."""
    inits = parameter_inits(model)
    parallelize(model, degrees, meshes, precision, config)

    def drawn(name: str, shape: torch.Size, rows: torch.Tensor) -> torch.Tensor:
        return draw(name, shape, rows, inits[name], config.debug.seed, device)

    storage = torch.device("cpu") if config.training.enable_cpu_offload else device
    if fake is None:
        fill_parameters(model, storage, drawn)
        model.fill_buffers(device)
    else:
        with fake:
            model.to_empty(device=storage)
            model.fill_buffers(device)
    model.set_global_batch(global_batch_size(config.training, degrees.dp))


def build_data(
    section: Training | Validation, tokenizer: Tokenizer, num_slots: int, slots: range, seed: int
) -> Loader:
    """The loader of a rank's slots; validation reads its data once, and in order."""
    training = isinstance(section, Training)
    data = DataConfig(
        dataset=section.dataset,
        dataset_path=section.dataset_path,
        num_slots=num_slots,
        seq_len=section.seq_len,
        seed=seed,
        repeat=training and section.repeat,
        shuffle=training and section.shuffle,
        section="training" if training else "validation",
        **asdict(section.dataloader),
    )
    return build_loader(data, tokenizer, slots)


def build_metrics(
    config: JobConfig, model_config: DecoderConfig, world: World, device: torch.device
) -> MetricsLogger:
    """What reports a rank's progress; `config` has its global batch size settled."""
    training = config.training
    workload = Workload(
        num_steps=training.steps,
        tokens_per_step=training.global_batch_size * training.seq_len,
        flops_per_token=flops_per_token(model_config, training.seq_len),
        num_devices=world.size,
    )
    dump_folder = config.job.dump_folder
    return MetricsLogger(config.metrics, dump_folder, workload, rank=world.rank, device=device)
