"""How the oracle's two runs compare: each parameter's gradients, loss, gradient norm and routing."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchtitan.verify_routing import LayerRouting
from torchtitan.verify_steps import RankResult

TOLERANCE = 1e-5
"""Of a gradient's relative L2 error and of its norm's ratio; loss and gradient norm likewise."""
ROUNDING = 2.0
"""In low precision, the same in times what rounding does to one process's own gradients: parts of a
batch may have other scales than the whole, and two roundings differ by more than one."""


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


def compare_gradients(
    ranks: Sequence[RankResult], reference: RankResult, tolerances: Mapping[str, float]
) -> list[Row]:
    """Each parameter of the layout's ranks beside one process's; `tolerances` by name, where not TOLERANCE."""
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


def deviation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest of any step, relative to `theirs`."""
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
