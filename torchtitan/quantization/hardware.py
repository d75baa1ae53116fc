"""Can this device multiply in few bits?"""

from collections.abc import Iterator
from typing import Any

import torch

from torchtitan.config.faults import Fault
from torchtitan.config.schema import JobConfig


def hardware_faults(
    device: torch.device, least: tuple[int, int], what: str, key: str, value: Any, remedy: str
) -> Iterator[Fault]:
    """A fault where the device does not have the compute capability `least` that `what` (plural) need."""
    if device.type != "cuda":
        yield Fault(key, f"{what} need a GPU, and this machine trains on its CPU.", remedy, value)
    elif (capability := torch.cuda.get_device_capability(device)) < least:
        needed, has = (".".join(map(str, version)) for version in (least, capability))
        reason = f"{what} need compute capability {needed}, and this GPU has {has}."
        yield Fault(key, reason, remedy, value)


def precision_faults(config: JobConfig, name: str) -> Iterator[Fault]:
    """A fault where products would not be in bfloat16, which is what hardware has."""
    if config.training.mixed_precision_param == "float32":
        reason = f"{name} multiplies in bfloat16."
        yield Fault("training.mixed_precision_param", reason, 'Use "bfloat16".', "float32")
