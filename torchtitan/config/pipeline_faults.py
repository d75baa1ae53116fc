"""Which pipelines cannot run, and what could."""

import math
from collections.abc import Iterator
from importlib.metadata import version

from torchtitan.config.faults import Fault
from torchtitan.config.names import nearest
from torchtitan.config.near_numbers import nearest_numbers
from torchtitan.config.pipeline import CSV_SCHEDULES, SCHEDULES, PipelinePlan
from torchtitan.config.schema import JobConfig

_KEY = "parallelism.pipeline_parallel_"
SPLITS_BACKWARD = (2, 13)
"""The first version of torch whose split backward was seen right; 2.11's was not, 2.12 is not known."""


def pipeline_faults(config: JobConfig, n_layers: int) -> Iterator[Fault]:
    """Faults of a config's pipeline, for a model of so many layers; none where it has no pipeline."""
    parallelism, local = config.parallelism, config.training.local_batch_size
    size = parallelism.pipeline_parallel_microbatch_size
    layers = parallelism.pipeline_parallel_layers_per_stage or 1
    # Single values are checked in bounds.py, and that microbatches make up the batch in checks.py.
    if parallelism.pipeline_parallel_degree == 1 or min(size, local, layers) < 1 or local % size:
        return
    plan = PipelinePlan(config, n_layers)
    if faults := list(_schedule_faults(plan)):
        yield from faults  # the rest follows from the schedule
        return
    given = parallelism.module_fqns_per_model_part is not None
    if (given or plan.csv is not None) and parallelism.pipeline_parallel_layers_per_stage is not None:
        said_by = "parallelism.module_fqns_per_model_part" if given else f"{_KEY}schedule_csv"
        reason, value = f"{said_by} says which stages there are.", layers
        yield Fault(f"{_KEY}layers_per_stage", reason, "Leave it unset.", value)
    yield from _given_stage_faults(plan) if given else _stage_faults(plan)
    yield from _microbatch_faults(plan)
    yield from _combination_faults(plan)


def _schedule_faults(plan: PipelinePlan) -> Iterator[Fault]:
    name = plan.parallelism.pipeline_parallel_schedule
    known = ", ".join(schedule.name for schedule in SCHEDULES.values())
    if plan.csv is not None:
        for reason in plan.csv.problems(plan.num_ranks):
            yield Fault(f"{_KEY}schedule_csv", reason, value=plan.csv.path)
    elif name in CSV_SCHEDULES:
        reason = "runs a schedule from a file, and none is given."
        yield Fault(f"{_KEY}schedule", reason, f"Set {_KEY}schedule_csv, or use {known}.", name)
    elif name.lower() not in SCHEDULES:
        near = nearest(name, SCHEDULES)
        remedy = f'Did you mean "{SCHEDULES[near].name}"? ' if near else ""
        yield Fault(f"{_KEY}schedule", "no such name.", f"{remedy}Known: {known}.", name)


def _stage_faults(plan: PipelinePlan) -> Iterator[Fault]:
    stages, weight, counted = plan.num_stages, plan.weight, f"with the ends counted as {sum(plan.ends)}"
    if not plan.can_have(stages):
        layers = plan.parallelism.pipeline_parallel_layers_per_stage
        reason = f"makes {stages} stages of {plan.n_layers} layers, {counted}; {_wanted(plan)}."
        works = [n for n in range(1, weight + 1) if plan.can_have(math.ceil(weight / n))]
        near = nearest_numbers(works, layers)
        remedy = f"Use {near}." if near else "Leave it unset."
        yield Fault(f"{_KEY}layers_per_stage", reason, remedy, layers)
    elif stages > weight:
        reason = f"{stages} stages are more than the {plan.n_layers} layers, {counted}."
        remedy = f"Use at most {weight * plan.num_ranks // stages} ranks."
        yield Fault(f"{_KEY}degree", reason, remedy, plan.num_ranks)
    else:
        share, left = divmod(weight, stages)
        most = {"first": share + (left > 0), "last": share}
        for (end, limit), less in zip(most.items(), plan.ends, strict=True):
            if less > limit:
                reason = f"a stage has {limit} layers to give away."
                yield Fault(f"{_KEY}{end}_stage_less_layers", reason, f"Use 0 to {limit}.", less)


def _wanted(plan: PipelinePlan) -> str:
    stages = {
        "single": f"{plan.num_ranks} stages",
        "loop": f"a multiple of {plan.num_ranks} stages",
        "v": f"{2 * plan.num_ranks} stages",
    }
    if plan.csv is not None:
        return f"the schedule file has {plan.csv.num_stages}"
    return f"{plan.schedule.name} on {plan.num_ranks} ranks has {stages[plan.schedule.order]}"


def _given_stage_faults(plan: PipelinePlan) -> Iterator[Fault]:
    given = plan.parallelism.module_fqns_per_model_part
    listed = [name for part in given for name in part]
    problems = [f"there is no module {name}" for name in listed if name not in plan.names]
    problems += [f"{name} is in no stage" for name in plan.names if name not in listed]
    problems += [f"{name} is in two places" for name in plan.names if listed.count(name) > 1]
    problems += [f"stage {i} is empty" for i, part in enumerate(given) if not part]
    if not problems and [name for part in plan.modules for name in part] != plan.names:
        problems.append("stages do not follow the model's order: tok_embeddings, layers, norm, output")
    if not plan.can_have(len(given)):
        problems.append(f"these are {len(given)} stages, and {_wanted(plan)}")
    if problems:
        yield Fault("parallelism.module_fqns_per_model_part", f"{'; '.join(problems)}.", value=given)


def _microbatch_faults(plan: PipelinePlan) -> Iterator[Fault]:
    size = plan.parallelism.pipeline_parallel_microbatch_size
    count, place = plan.num_microbatches, (plan.num_ranks, plan.num_stages)
    if plan.schedule.takes(count, *place):
        return
    if plan.csv is not None:
        near = [plan.csv.num_microbatches]
    else:
        near = plan.schedule.counts_near(count, *place)
    reason = (
        f"makes {count} microbatches of {size}, which {plan.schedule.name} does not run through "
        f"{plan.num_stages} stages on {plan.num_ranks} ranks."
    )
    remedy = f"Use {' or '.join(str(n * size) for n in near)}."
    yield Fault("training.local_batch_size", reason, remedy, plan.config.training.local_batch_size)


def _combination_faults(plan: PipelinePlan) -> Iterator[Fault]:
    config, parallelism, name = plan.config, plan.parallelism, plan.schedule.name
    if plan.schedule.splits_backward:
        if (installed := _torch_version()) < SPLITS_BACKWARD:
            reason = (
                f"torch {'.'.join(map(str, installed))} cannot split the backward of functions like "
                f"those of experts and rows; {'.'.join(map(str, SPLITS_BACKWARD))} can."
            )
            yield Fault(f"{_KEY}schedule", reason, "Use 'Interleaved1F1B', or a newer torch.", name)
        if parallelism.fsdp_reshard_after_forward == "always":
            reason = f"{name} computes gradients of inputs and weights apart, and would lose some."
            yield Fault("parallelism.fsdp_reshard_after_forward", reason, "Use 'never'.", "always")
        checkpoint = config.activation_checkpoint
        if checkpoint.mode == "selective" and checkpoint.selective_ac_option == "op":
            reason = f"{name} recomputes a layer twice, and what operations kept is there once."
            remedy = "Use a number, such as '2', or activation_checkpoint.mode = 'full'."
            yield Fault("activation_checkpoint.selective_ac_option", reason, remedy, "op")
        if config.compile.enable:
            reason = f"the backward of compiled code cannot be split, as {name} does."
            remedy = f"Use false, or {_KEY}schedule = 'Interleaved1F1B'."
            yield Fault("compile.enable", reason, remedy, True)
    overlap = parallelism.pipeline_parallel_expert_parallel_overlap
    if name == "DualPipeV" and parallelism.expert_parallel_degree > 1 and overlap:
        reason = "overlapping experts' communication with another microbatch is not built."
        yield Fault(f"{_KEY}expert_parallel_overlap", reason, "Use false.", True)


def _torch_version() -> tuple[int, int]:
    """Of the one installed, without importing it."""
    major, minor, *_ = version("torch").split(".")
    return int(major), int(minor)
