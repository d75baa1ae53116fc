"""What of a layout only GPUs can do, and what stands for it where there are none."""

from dataclasses import replace

from torchtitan.config.schema import Parallelism

_INSTEAD = {"enable_async_tensor_parallel": False, "expert_parallel_comm_backend": "standard"}


def without_gpus(parallelism: Parallelism, notes: list[str]) -> Parallelism:
    """The same layout on CPUs; `notes` is told of every change."""
    notes += [
        f"parallelism.{key}: {given} -> {instead}"
        for key, instead in _INSTEAD.items()
        if (given := getattr(parallelism, key)) != instead
    ]
    return replace(parallelism, **_INSTEAD)
