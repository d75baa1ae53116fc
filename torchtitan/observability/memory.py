"""How much memory does this rank use? The GPU allocator's peaks, or the process's on a CPU."""

import os
import resource
import sys

import torch

from torchtitan.logging import logger

GIB = 1024**3


class MemoryMonitor:
    """Peaks since the last reading on a GPU, since the process began on a CPU; no host sync."""

    def __init__(self, device: torch.device):
        self.device = device
        self.retries = self.ooms = 0
        if device.type == "cuda":
            self.capacity = torch.cuda.get_device_properties(device).total_memory
        else:
            self.capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def read(self) -> dict[str, float]:
        """GiB and percent of the device; `memory` is what the allocator holds, or resident memory."""
        if self.device.type != "cuda":
            return self._sizes("memory", _peak_resident_bytes())
        stats = torch.cuda.memory_stats(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        retries, ooms = stats["num_alloc_retries"], stats["num_ooms"]
        self._warn(retries, ooms)
        return {
            **self._sizes("memory", stats["reserved_bytes.all.peak"]),
            **self._sizes("memory_active", stats["active_bytes.all.peak"]),
            "num_alloc_retries": retries,
            "num_ooms": ooms,
        }

    def _sizes(self, name: str, num_bytes: int) -> dict[str, float]:
        return {name: num_bytes / GIB, f"{name}_percent": 100 * num_bytes / self.capacity}

    def _warn(self, retries: int, ooms: int) -> None:
        if retries > self.retries:
            logger.warning(
                f"{retries - self.retries} CUDA allocations had to empty the cache and try again: "
                "memory is nearly full, which slows steps down"
            )
        if ooms > self.ooms:
            logger.warning(f"{ooms - self.ooms} CUDA allocations failed for lack of memory")
        self.retries, self.ooms = retries, ooms


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux
