"""How a run's larger parts are built from its config: the model on its mesh, loaders of its data."""

from dataclasses import asdict

import torch
from torch import nn

from torchtitan.config.batch_size import global_batch_size
from torchtitan.config.schema import JobConfig, Training, Validation
from torchtitan.data.loader import DataConfig, Loader, build_loader
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.distributed.apply import parallelize
from torchtitan.distributed.fsdp import Precision, fill_parameters
from torchtitan.distributed.mesh import Degrees
from torchtitan.models.decoder import DecoderConfig
from torchtitan.models.init import draw, parameter_inits


def build_model(
    model_config: DecoderConfig,
    degrees: Degrees,
    precision: Precision,
    config: JobConfig,
    device: torch.device,
) -> nn.Module:
    """The model spread over all ranks, with the initial weights of config.debug.seed."""
    with torch.device("meta"):
        model = model_config.build()
    inits = parameter_inits(model)
    parallelize(model, degrees, device.type, precision, config)

    def drawn(name: str, shape: torch.Size, rows: torch.Tensor) -> torch.Tensor:
        return draw(name, shape, rows, inits[name], config.debug.seed, device)

    storage = torch.device("cpu") if config.training.enable_cpu_offload else device
    fill_parameters(model, storage, drawn)
    model.fill_buffers(device)
    model.set_global_batch(global_batch_size(config.training, degrees.dp))
    return model


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
