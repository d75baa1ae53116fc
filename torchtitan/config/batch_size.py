"""How many sequences does an optimizer step take?"""

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.near_numbers import nearest_multiples
from torchtitan.config.schema import Training


def global_batch_size(config: Training, dp: int) -> int:
    """Sequences of a step, over all of `dp` data-parallel ranks and their microbatches.

    -1 means one microbatch a rank. Raises ConfigError where ranks would get unequal shares.
    """
    step = config.local_batch_size * dp
    size = config.global_batch_size
    if size == -1:
        return step
    if size % step:
        reason = f"is not a multiple of training.local_batch_size = {config.local_batch_size}"
        reason += f" times {dp} data-parallel ranks." if dp > 1 else "."
        remedy = f"Use {nearest_multiples(step, size)}."
        raise ConfigError([Fault("training.global_batch_size", reason, remedy, value=size)])
    return size
