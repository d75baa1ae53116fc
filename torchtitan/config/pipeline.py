"""How a pipeline cuts layers into stages and batches into microbatches.

A stage is a piece of the model, and a rank has one or more. Plain arithmetic on names and counts;
pipeline_faults.py says what cannot be, and distributed/pipeline.py runs what is planned here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torchtitan.config.pipeline_csv import CsvSchedule, read_csv
from torchtitan.config.schema import JobConfig, Parallelism

_FIRST, _LAST = ("tok_embeddings",), ("norm", "output")


@dataclass(frozen=True)
class Schedule:
    """What torch's schedule of this name can be given."""

    name: str
    order: str = "loop"
    """Where stages go: "single", one a rank; "loop", rank after rank and again; "v", there and back."""
    splits_backward: bool = False
    """Gradients of inputs and of weights are computed apart."""
    takes: Callable[[int, int, int], bool] = lambda count, ranks, stages: True
    """Whether so many microbatches can run."""

    def counts_near(self, count: int, ranks: int, stages: int) -> list[int]:
        """The numbers of microbatches on both sides of `count` that can run."""
        below = [n for n in range(1, count) if self.takes(n, ranks, stages)][-1:]
        above = range(count + 1, count + 1 + max(ranks, stages))
        return [*below, *[n for n in above if self.takes(n, ranks, stages)][:1]]


def _fills_stages(count: int, ranks: int, stages: int) -> bool:
    return count >= stages


def _fills_rounds(count: int, ranks: int, stages: int) -> bool:
    """Microbatches go through the ranks in rounds, of as many each and at least one a rank."""
    return count % max(1, count // ranks) == 0


SCHEDULES = {
    schedule.name.lower(): schedule
    for schedule in (
        Schedule("GPipe", order="single"),
        Schedule("1F1B", order="single", takes=_fills_stages),
        Schedule("LoopedBFS"),
        Schedule("Interleaved1F1B", takes=_fills_rounds),
        Schedule("InterleavedZeroBubble", splits_backward=True, takes=_fills_rounds),
        Schedule("ZBVZeroBubble", order="v", splits_backward=True),
        Schedule("DualPipeV", order="v", splits_backward=True, takes=_fills_stages),
    )
}
"""By name in lower case, as torch looks them up. The rules are those of torch 2.13."""

CSV_SCHEDULES = ("PipelineScheduleSingle", "PipelineScheduleMulti", "_PipelineScheduleRuntime")
"""Names of torch's that are no schedule by themselves, but run one from a file."""


class PipelinePlan:
    """The pipeline of a config and a model with `n_layers` layers; makes sense where it has no faults."""

    def __init__(self, config: JobConfig, n_layers: int):
        self.config, self.n_layers = config, n_layers
        self.parallelism: Parallelism = config.parallelism
        self.num_ranks = self.parallelism.pipeline_parallel_degree

    @cached_property
    def csv(self) -> CsvSchedule | None:
        path = self.parallelism.pipeline_parallel_schedule_csv
        return read_csv(path) if path else None

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule by name; from a file, whatever that says."""
        if self.csv is not None:
            splits = self.csv.splits_backward
            return Schedule(self.csv.path, "csv", splits, lambda n, *_: n == self.csv.num_microbatches)
        return SCHEDULES[self.parallelism.pipeline_parallel_schedule.lower()]

    @property
    def num_stages(self) -> int:
        parallelism = self.parallelism
        if self.csv is not None:
            return self.csv.num_stages
        if parallelism.module_fqns_per_model_part is not None:
            return len(parallelism.module_fqns_per_model_part)
        if parallelism.pipeline_parallel_layers_per_stage is not None:
            return math.ceil(self.weight / parallelism.pipeline_parallel_layers_per_stage)
        return self.num_ranks * (1 if self.schedule.order == "single" else 2)

    @property
    def num_microbatches(self) -> int:
        """Of one run of the schedule, which takes training.local_batch_size sequences."""
        size = self.parallelism.pipeline_parallel_microbatch_size
        return self.config.training.local_batch_size // size

    @property
    def ranks(self) -> tuple[int, ...]:
        """The pipeline rank of each stage."""
        if self.csv is not None:
            return self.csv.ranks
        loops = [range(self.num_ranks)] * (self.num_stages // self.num_ranks)
        if self.schedule.order == "v":
            loops[1::2] = [range(self.num_ranks)[::-1]] * (len(loops) // 2)
        return tuple(rank for loop in loops for rank in loop)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a pipeline rank, in the model's order."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]

    @property
    def ends(self) -> tuple[int, int]:
        """As how many layers the modules before and after them count."""
        parallelism = self.parallelism
        return (
            parallelism.pipeline_parallel_first_stage_less_layers,
            parallelism.pipeline_parallel_last_stage_less_layers,
        )

    @property
    def weight(self) -> int:
        """How many layers there are to divide, with the ends counted."""
        return self.n_layers + sum(self.ends)

    @property
    def names(self) -> list[str]:
        """Of all modules that go to stages."""
        return [*_FIRST, *(f"layers.{i}" for i in range(self.n_layers)), *_LAST]

    @property
    def modules(self) -> tuple[tuple[str, ...], ...]:
        """Names of each stage's modules, in the model's order."""
        names = self.names
        given = self.parallelism.module_fqns_per_model_part
        if given is not None:
            return tuple(tuple(sorted(part, key=names.index)) for part in given)
        # Evenly, the first ones taking what is left over; the ends count as layers.
        share, left = divmod(self.weight, self.num_stages)
        sizes = [share + (stage < left) for stage in range(self.num_stages)]
        first, last = self.ends
        sizes[0] += len(_FIRST) - first
        sizes[-1] += len(_LAST) - last
        starts = [sum(sizes[:stage]) for stage in range(self.num_stages)]
        return tuple(tuple(names[s : s + size]) for s, size in zip(starts, sizes, strict=True))

    def can_have(self, stages: int) -> bool:
        """Whether the schedule places so many stages on its ranks."""
        order, ranks = self.schedule.order, self.num_ranks
        if order == "csv":
            return stages == self.csv.num_stages
        if order == "loop":
            return stages >= ranks and stages % ranks == 0
        return stages == (ranks if order == "single" else 2 * ranks)
