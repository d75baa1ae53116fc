"""Host memory of CPU ranks: freed tensors stay with the process."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors; other C libraries are left as they are.

    By default it gives large blocks back at once, and each step pays for the kernel to map and clear
    the same pages again: some 4 % of a CPU step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
