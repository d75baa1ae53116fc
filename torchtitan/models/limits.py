"""Can a layout split a model of these sizes? Faults that name the nearest sizes that work."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torchtitan.config.faults import Fault
from torchtitan.config.near_numbers import nearest_divisors, nearest_multiples
from torchtitan.config.schema import JobConfig, Parallelism
from torchtitan.config.sequence_cuts import cuts_head_and_tail, length_unit
from torchtitan.models.moe.config import MoEConfig


def size_faults(path: str, sizes: Mapping[str, int]) -> Iterator[Fault]:
    """Nothing can be split into, or made of, less than one; `path` says whose fields they are."""
    for name, size in sizes.items():
        if size < 1:
            yield Fault(f"{path}.{name}", "must be at least 1.", value=size)


def tensor_parallel_faults(tp: int, sizes: Mapping[str, int]) -> Iterator[Fault]:
    """`sizes`, by what they are, must all divide by the degree."""
    uneven = [f"{size} ({name})" for name, size in sizes.items() if size % tp]
    if uneven:
        yield Fault(
            "parallelism.tensor_parallel_degree",
            f"does not divide {' and '.join(uneven)} of the model.",
            f"Use {nearest_divisors(math.gcd(*sizes.values()), tp)}.",
            value=tp,
        )


def context_parallel_faults(config: JobConfig, sizes: Mapping[str, int]) -> Iterator[Fault]:
    """Where ranks exchange heads, each gets some of what tensor parallelism left: `sizes` by name."""
    parallelism = config.parallelism
    cp, tp = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    if cp == 1 or parallelism.context_parallel_method != "heads":
        return
    left = {name: size // tp for name, size in sizes.items() if size % tp == 0}
    uneven = [f"{size} {name}" for name, size in left.items() if size % cp]
    if uneven:
        of_rank = f" of a tensor-parallel rank ({tp} share the model's)" if tp > 1 else ""
        yield Fault(
            "parallelism.context_parallel_degree",
            f"does not divide the {' and '.join(uneven)}{of_rank}.",
            f"Use {nearest_divisors(math.gcd(*left.values()), cp)}, or set "
            'parallelism.context_parallel_method = "kv".',
            value=cp,
        )


def length_faults(config: JobConfig, max_seq_len: int) -> Iterator[Fault]:
    """Sequences fit the model's positions, and are split evenly over ranks."""
    unit = length_unit(config.parallelism)
    for key, length in sequence_lengths(config).items():
        if length > max_seq_len:
            reason = f"is beyond the model's limit of {max_seq_len} positions."
            remedy = f"Use at most {max_seq_len}, or raise model.overrides.max_seq_len."
            yield Fault(key, reason, remedy, length)
        if length % unit:
            remedy = f"Use {nearest_multiples(unit, length)}"
            without = replace(config.parallelism, enable_sequence_parallel=False)
            if length % length_unit(without) == 0:
                remedy += ", or set parallelism.enable_sequence_parallel = false"
            yield Fault(key, _why_evenly(config.parallelism), f"{remedy}.", length)


def _why_evenly(parallelism: Parallelism) -> str:
    tp, cp = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
    if cp == 1:
        return (
            f"with parallelism.tensor_parallel_degree = {tp}, sequence parallelism splits every "
            f"sequence evenly over {tp} ranks."
        )
    pieces = f"{2 * cp} equal pieces, two a rank" if cuts_head_and_tail(parallelism) else f"{cp} equal pieces"
    split = tp > 1 and parallelism.enable_sequence_parallel
    further = f", and sequence parallelism each rank's part into {tp}" if split else ""
    return (
        f"with parallelism.context_parallel_degree = {cp}, sequences are cut into {pieces}{further}: "
        f"lengths must divide by {length_unit(parallelism)}."
    )


def sequence_lengths(config: JobConfig) -> dict[str, int]:
    """The lengths that a run uses, by the keys that set them."""
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable:
        lengths["validation.seq_len"] = config.validation.seq_len
    return lengths


def routing_faults(moe: MoEConfig) -> Iterator[Fault]:
    """The experts' own numbers fit together."""
    prefix = "model.overrides.moe"
    if moe.num_experts % moe.num_expert_groups:
        remedy = f"Use {nearest_divisors(moe.num_experts, moe.num_expert_groups)}."
        reason = f"does not divide the {moe.num_experts} experts."
        yield Fault(f"{prefix}.num_expert_groups", reason, remedy, moe.num_expert_groups)
        return
    if not 1 <= moe.num_limited_groups <= moe.num_expert_groups:
        reason = f"must be between 1 and the number of groups, {moe.num_expert_groups}."
        remedy = _use_up_to(moe.num_expert_groups)
        yield Fault(f"{prefix}.num_limited_groups", reason, remedy, moe.num_limited_groups)
        return
    size = moe.num_experts // moe.num_expert_groups
    if moe.num_expert_groups > 1 and size < moe.num_scores_per_group:
        reason = f"must be between 1 and the experts of a group, {size}."
        remedy = _use_up_to(size)
        yield Fault(f"{prefix}.num_scores_per_group", reason, remedy, moe.num_scores_per_group)
    choice = size * moe.num_limited_groups
    if not 1 <= moe.top_k <= choice:
        reason = f"must be between 1 and the experts a token chooses among, {choice}."
        yield Fault(f"{prefix}.top_k", reason, _use_up_to(choice), moe.top_k)


def expert_parallel_faults(config: JobConfig, moe: MoEConfig) -> Iterator[Fault]:
    """Ranks get whole experts, or even parts of them."""
    parallelism = config.parallelism
    ep, etp = parallelism.expert_parallel_degree, parallelism.expert_tensor_parallel_degree
    if moe.num_experts % ep:
        reason = f"does not divide the {moe.num_experts} experts of a layer."
        remedy = f"Use {nearest_divisors(moe.num_experts, ep)}."
        yield Fault("parallelism.expert_parallel_degree", reason, remedy, ep)
    if ep > 1 and moe.ffn_dim % etp:  # with ep = 1 the tensor-parallel degree splits experts
        reason = f"does not divide the experts' width of {moe.ffn_dim}."
        yield Fault("parallelism.expert_tensor_parallel_degree", reason, "Use 1.", etp)


def no_expert_faults(config: JobConfig) -> Iterator[Fault]:
    """What only experts can do is not asked of a model without them."""
    asked = {
        "parallelism.expert_parallel_degree": (config.parallelism.expert_parallel_degree, 1),
        "debug.moe_force_load_balance": (config.debug.moe_force_load_balance, False),
        "moe.experts_backend": (config.moe.experts_backend, "auto"),
        "moe.max_rows_per_chunk": (config.moe.max_rows_per_chunk, 0),
        "moe.sequence_balance_coeff": (config.moe.sequence_balance_coeff, 0.0),
        "moe.global_balance_coeff": (config.moe.global_balance_coeff, 0.0),
        "moe.router_z_coeff": (config.moe.router_z_coeff, 0.0),
    }
    for key, (value, without) in asked.items():
        if value != without:
            yield Fault(key, "the model has no experts.", f"Use {json.dumps(without)}.", value)


def _use_up_to(most: int) -> str:
    return f"Use 1 to {most}." if most > 1 else "Use 1."
