"""Does a layout compute what one process computes? The oracle, for any training config.

`python -m torchtitan.verify --job.config_file X [overrides]` trains the config's model for two steps
twice, on the layout's ranks and on one, in fp32 on this machine's CPU, and compares every gradient.
`--verify.full` keeps the model's size, `--verify.json FILE` writes the report for machines.
"""

import json
import logging
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan.build import build_model
from torchtitan.config.faults import EXIT_CONFIG, ConfigError, Fault
from torchtitan.config.manager import load_config
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.context_parallel import sequence_part
from torchtitan.distributed.fsdp import Precision
from torchtitan.distributed.grad_norm import global_grad_norm
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.local_parts import local_part, place_of
from torchtitan.distributed.mesh import Degrees
from torchtitan.distributed.styles import loss_layout
from torchtitan.expert_load import ExpertLoad
from torchtitan.logging import init_logger
from torchtitan.optim.optimizer import build_optimizer
from torchtitan.preflight import report
from torchtitan.verify_case import Case, alone, settle, without_rounding
from torchtitan.verify_routing import (
    NEAR_TIE,
    Flips,
    LayerRouting,
    Recorded,
    Recorder,
    Replayer,
    summarize,
)

TOLERANCE = 1e-5
"""Of a gradient's relative L2 error and of its norm's ratio; loss and gradient norm likewise."""
ROUNDING = 2.0
"""In low precision, the same in times what rounding does to one process's own gradients: parts of a
batch may have other scales than the whole, and two roundings differ by more than one."""
CPU = torch.device("cpu")

Sabotage = Callable[[nn.Module], None]
"""Breaks a layout's model on purpose, for the tests of this oracle."""


@dataclass(frozen=True)
class RankResult:
    """What one rank saw."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, torch.Tensor]]
    """Whole gradients of each step, from the first rank of each pipeline stage only."""
    shards: list[tuple[str, tuple[int, ...], bytes]]
    """After the steps, of each weight and buffer: its name, which part the rank holds, and the part's bytes."""
    loads: list[torch.Tensor]
    """Of each step, tokens by MoE layer and expert over the global batch."""
    recorded: Recorded
    """What the routers chose, where that was recorded."""
    flips: dict[str, Flips]
    """Where they would have chosen otherwise, where choices were repeated."""
    peak_mib: float


@dataclass(frozen=True)
class Row:
    """One parameter: its worst step."""

    name: str
    error: float
    """Relative L2 error of the gradient, over the larger of its norm and 1e-8 of the global norm."""
    norm_ratio: float
    replicas_equal: bool
    tolerance: float
    """Of both."""

    @property
    def passed(self) -> bool:
        return max(self.error, abs(self.norm_ratio - 1)) < self.tolerance and self.replicas_equal


@dataclass(frozen=True)
class Report:
    """The outcome, as printed and as JSON."""

    settled: list[str]
    world_size: int
    loss_deviation: float
    norm_deviation: float
    norms_equal: bool
    """Every rank has the same bits of the gradient norm."""
    rows: list[Row]
    routing: list[LayerRouting]
    seconds: float
    peak_mib: list[float]
    """Resident memory of each rank at its highest, Python and torch included."""

    @property
    def tolerance(self) -> float:
        """Of what comes from all parameters."""
        return max(row.tolerance for row in self.rows)

    @property
    def passed(self) -> bool:
        close = max(self.loss_deviation, self.norm_deviation) < self.tolerance
        parts = [*self.rows, *self.routing]
        return close and self.norms_equal and all(part.passed for part in parts)


def verify(config: JobConfig, full: bool = False, sabotage: Sabotage | None = None) -> Report:
    """Compare a config's layout with one process. Raises ConfigError where it cannot work at all."""
    start = time.perf_counter()
    case = settle(config, full)
    reference = run_ranks(run_steps, 1, alone(case), None, None, timeout=600)[0]
    recorded = reference.recorded
    tolerances = {}
    if (finer := without_rounding(case)) != case:
        [unrounded] = run_ranks(run_steps, 1, alone(finer), None, recorded, timeout=600)
        moved = _rows([unrounded], reference, {})
        tolerances = {row.name: max(ROUNDING * row.error, TOLERANCE) for row in moved}
    ranks = run_ranks(run_steps, case.world_size, case, sabotage, recorded, timeout=600)
    near_tie = max([NEAR_TIE, *tolerances.values()])
    return Report(
        settled=list(case.settled),
        world_size=case.world_size,
        loss_deviation=_deviation(ranks[0].losses, reference.losses),
        norm_deviation=_deviation(ranks[0].norms, reference.norms),
        norms_equal=all(rank.norms == ranks[0].norms for rank in ranks),
        rows=_rows(ranks, reference, tolerances),
        routing=summarize([rank.flips for rank in ranks], ranks[0].loads, reference.loads, near_tie),
        seconds=time.perf_counter() - start,
        peak_mib=[rank.peak_mib for rank in ranks],
    )


def run_steps(case: Case, sabotage: Sabotage | None, recorded: Recorded | None) -> RankResult:
    """Train this rank's part for a few steps; called inside a process group.

    Routers' choices are those of `recorded`, or are recorded where it is None.
    """
    # Gathering a weight that is split twice warns on every rank that it takes two collectives.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    config = case.config
    degrees = Degrees.resolve(config.parallelism, dist.get_world_size())
    precision = Precision(torch.float32, torch.float32, torch.float32)
    model = build_model(case.model_config, degrees, precision, config, CPU)
    for part in model.parts if sabotage is not None else ():
        sabotage(part)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    rank, training, parallelism = dist.get_rank(), config.training, config.parallelism
    part = sequence_part(parallelism, degrees, rank)
    recorder = Recorder(model, training.global_batch_size) if recorded is None else None
    split = degrees.tp // degrees.routing_copies(parallelism.enable_sequence_parallel)
    replayer = Replayer(model, part, split, rank % split, recorded or {})
    expert_load = ExpertLoad(model, case.model_config, degrees, parallelism)
    losses, norms, gradients, loads = [], [], [], []
    with loss_layout(degrees.tp, parallelism):
        for step, whole in enumerate(case.batches):
            batch, rows = whole.cut(part), degrees.slots(rank, len(whole.tokens))
            with replayer.repeat(step):
                loss = model.forward_backward(batch, rows, whole.num_valid_tokens, training)
            loss = loss / degrees.tp
            norm, loss = global_grad_norm(model.parameters(), loss, degrees.stage_size)
            losses.append(loss.item())
            norms.append(norm.item())
            gradients.append({name: _whole_gradient(p) for name, p in model.named_parameters()})
            optimizer.step()
            model.weights_changed()
            optimizer.zero_grad()
            expert_load.finish_step(stepped=True)
            loads += [] if expert_load.counts is None else [expert_load.counts]
    return RankResult(
        losses,
        norms,
        gradients if rank % degrees.stage_size == 0 else [],
        [(name, *_shard(t)) for part in model.parts for name, t in part.state_dict().items()],
        loads,
        {} if recorder is None else recorder.steps,
        replayer.seen,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def _whole_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Gathered over all ranks; a gradient that never came about is one of zeros."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def _shard(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return place_of(tensor), local_part(tensor).detach().contiguous().numpy().tobytes()


def _rows(
    ranks: Sequence[RankResult], reference: RankResult, tolerances: Mapping[str, float]
) -> list[Row]:
    rows = []
    parts: dict[tuple[str, tuple[int, ...]], set[bytes]] = defaultdict(set)
    for name, place, content in (shard for rank in ranks for shard in rank.shards):
        parts[name, place].add(content)
    unequal = {name for (name, _), contents in parts.items() if len(contents) > 1}
    by_stage = zip(*(rank.gradients for rank in ranks if rank.gradients), strict=True)
    gradients = [{name: grad for part in step for name, grad in part.items()} for step in by_stage]
    for name in reference.gradients[0]:
        worst_error, worst_ratio = 0.0, 1.0
        steps = zip(gradients, reference.gradients, reference.norms, strict=True)
        for ours, theirs, global_norm in steps:
            expected = theirs[name].norm().item()
            scale = max(expected, 1e-8 * global_norm)
            error = _number((ours[name] - theirs[name]).norm().item() / scale)
            ratio = _number(ours[name].norm().item() / expected) if expected else 1.0
            worst_error = max(worst_error, error)
            worst_ratio = max(worst_ratio, ratio, key=lambda value: abs(value - 1))
        tolerance = tolerances.get(name, TOLERANCE)
        rows.append(Row(name, worst_error, worst_ratio, name not in unequal, tolerance))
    return rows


def _deviation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(_number(abs(a / b - 1)) for a, b in zip(ours, theirs, strict=True))


def _number(value: float) -> float:
    """Infinity in place of NaN, which is neither more nor less than anything."""
    return math.inf if math.isnan(value) else value


def summary(result: Report) -> str:
    """The report as a person reads it."""
    lines = ["Settled by itself:"] if result.settled else []
    lines += [f"  {note}" for note in result.settled]
    lines.append(f"{'parameter':44} {'error':>9} {'norm ratio':>12}  replicas")
    for row in result.rows:
        equal = "equal" if row.replicas_equal else "DIFFER"
        mark = f", {row.tolerance:.0e} allowed" if row.tolerance > TOLERANCE else ""
        mark += "" if row.passed else "  <-- wrong"
        lines.append(f"{row.name:44} {row.error:9.1e} {row.norm_ratio:12.8f}  {equal}{mark}")
    lines += [_routing_line(layer) for layer in result.routing]
    norms = "the same bits on every rank" if result.norms_equal else "DIFFERS between ranks"
    lines += [
        f"loss deviates by {result.loss_deviation:.1e}, gradient norm by "
        f"{result.norm_deviation:.1e} ({norms})",
        f"{result.world_size} ranks and one: {result.seconds:.1f} s, memory of a rank at most "
        f"{max(result.peak_mib):.0f} MiB",
    ]
    wrong = [part.name for part in (*result.rows, *result.routing) if not part.passed]
    if result.passed and result.tolerance > TOLERANCE:
        lines.append(f"EQUAL to one process but for rounding: {ROUNDING:g} times what that does to one process")
    elif result.passed:
        lines.append(f"EQUAL to one process within {TOLERANCE:g}")
    elif wrong:
        lines.append(f"WRONG: {', '.join(wrong)}")
    else:
        lines.append("WRONG: loss or gradient norm")
    return "\n".join(lines)


def _routing_line(layer: LayerRouting) -> str:
    load = "equal" if layer.load_equal else "DIFFERS"
    line = f"{layer.name:44} load {load}, experts chosen for {layer.choices:,} tokens"
    if layer.flips:
        line += f"; {layer.flips} near-ties within {layer.margin:.1e} ranked the other way, repeated"
    return line if layer.passed else f"{line}  <-- wrong"


def main(argv: Sequence[str]) -> int:
    """Verify the layout that `argv` describes; 0 equal, 1 wrong, 2 refused."""
    init_logger()
    if {"-h", "--help"} & set(argv):
        print(__doc__)  # before the keys of a config
    try:
        argv, full, json_file = _own_options(argv)
        result = verify(load_config(argv), full)
    except ConfigError as error:
        report(error, argv)
        return EXIT_CONFIG
    print(summary(result))
    if json_file:
        content = asdict(result) | {"passed": result.passed, "tolerance": result.tolerance}
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        Path(json_file).write_text(json.dumps(content, indent=1))
    return 0 if result.passed else 1


def _own_options(argv: Sequence[str]) -> tuple[list[str], bool, str | None]:
    """The arguments for the config, and ours: --verify.full and --verify.json FILE."""
    rest, full, json_file = [], False, None
    words = iter(argv)
    for word in words:
        if word == "--verify.full":
            full = True
        elif word == "--verify.json":
            json_file = next(words, "")
        elif word.startswith("--verify.json="):
            json_file = word.partition("=")[2]
        else:
            rest.append(word)
    if json_file == "":
        raise ConfigError([Fault("--verify.json", "needs the name of a file.")])
    return rest, full, json_file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
