"""What `[debug]` says of bits: the same in every run of one layout, the same in any batch."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from torchtitan.config.schema import Debug
from torchtitan.ops.batch_invariance import BatchInvariance


def make_deterministic(debug: Debug) -> None:
    """Let this process compute the same bits in every run, where `debug` says so.

    Before the first use of a GPU and of NCCL, which read the environment once; what the user has set
    there stays.
    """
    if not debug.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS adds up in any order
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # sums inside NVLink switches promise no order
    torch.use_deterministic_algorithms(True, warn_only=debug.deterministic_warn_only)
    # Inductor would time kernels that add up in different orders, and take the fastest of the day. No
    # public name; torch 2.13 has this one, an older one may choose by time.
    if hasattr(torch._inductor.config, "deterministic"):
        torch._inductor.config.deterministic = True


def arithmetic(debug: Debug) -> AbstractContextManager:
    """Put around forward and backward."""
    return BatchInvariance() if debug.batch_invariant else nullcontext()
