"""Asynchronous tensor parallelism: the compiler overlaps the exchanges with the products beside them.

Private switches of PyTorch, there is no public one as of torch 2.11 to 2.13: kept in this one place.
"""

import torch
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import Parallelism


def check_async_tensor_parallel(config: Parallelism, device: torch.device) -> None:
    """Raise ConfigError where it is asked for and `device` has no symmetric memory."""
    if config.enable_async_tensor_parallel and device.type != "cuda":
        reason = "needs GPUs that reach each other's memory; this machine trains on its CPU."
        setting = "parallelism.enable_async_tensor_parallel"
        raise ConfigError([Fault(setting, reason, "Leave it off.", value=True)])


def enable_async_tensor_parallel(mesh: DeviceMesh) -> None:
    """Fuse gathers and scatters with matrix products in what is compiled from now on."""
    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)
