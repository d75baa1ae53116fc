"""Where are sequences cut between ranks, and what must their length divide by?"""

import math

from torchtitan.config.schema import Parallelism


def cuts_head_and_tail(config: Parallelism) -> bool:
    """Whether context-parallel ranks have two pieces each.

    Ranks that exchange heads see whole sequences in attention: equal work from plain cuts.
    """
    balanced = config.context_parallel_load_balancer == "headtail"
    return config.context_parallel_degree > 1 and config.context_parallel_method == "kv" and balanced


def length_unit(config: Parallelism) -> int:
    """Every sequence's length is a multiple of this, so that all pieces are equally long."""
    pieces = 2 if cuts_head_and_tail(config) else 1
    split = config.tensor_parallel_degree if config.enable_sequence_parallel else 1
    return config.context_parallel_degree * math.lcm(pieces, split)
