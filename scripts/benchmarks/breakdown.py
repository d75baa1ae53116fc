"""Where does a step's time go? Sums a profiler trace by kind of work.

    ./run_train.sh --profiling.enable_profiling
    python scripts/benchmarks/breakdown.py outputs/profile_traces/step_10/rank_0.json.gz --top 20

On a GPU these are kernels, by their own names and by what they were launched inside; on a CPU operators,
each without those inside it. What overlaps counts in each, so that shares may add up to more than 100 %.
"""

import argparse
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import pick_device, table, write_report

COMMUNICATION, FLOAT8, REST = "communication", "scales and casts to float8", "norms and elementwise"
# The first kind whose pattern is found counts: in the name of a kernel or operator, or in the names of
# what it ran inside, one a line. Names are those of torch 2.11 and 2.13, NCCL, cuBLAS and CUTLASS.
KINDS = (
    (COMMUNICATION, r"nccl|^gloo:|^c10d::|multimem|(one|two)_shot|Memcpy PtoP|^_pu(ll|sh)$|barrier_kernel", None),
    ("FSDP copies and casts", r"fused__to_copy(_t|_view|_transpose)*_\d+$", r"^FSDP::"),
    # Inductor names a kernel also after the products and attention that take what it makes.
    (FLOAT8, r"^triton_\w*(_scaled_mm_|abs_max|abs_amax)|quantize", None),
    ("loss", r"log_softmax|nll_loss|cross_entropy|logsumexp", r"nll_loss|cross_entropy|log_softmax"),
    (REST, r"^triton_(poi|red|per)_", None),
    ("attention", r"flash|fmha|sdpa|attention|cudnn::fusion", r"_dot_product_|_attention_|flex_attention"),
    ("grouped GEMM", r"GroupProblemShape|grouped_(mm|gemm|up|down|rows|weights|product)", r"^aten::_(scaled_)?grouped_mm"),
    ("clip and optimizer", r"multi_tensor_apply|NormTwoOps|^_update$|^aten::_(foreach|fused)", r"^Optimizer\.step"),
    ("embedding", r"embedding", r"embedding"),
    ("dense GEMM", r"gemm|nvjet|cutlass|xmma|cublas|^aten::(add|b)?mm$|scaled_mm|mkldnn_linear", None),
    (
        "routing and dispatch",
        r"topk|sort|histogram|bincount|scan|cumsum|scatter|gather|index|(sum|take|invert)_rows|top_k|fill_tiles|clear_after",
        r"^torchtitan::(record_load|sum_rows|exchange)",
    ),
)
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Span:
    """Work of one kernel or operator, in microseconds."""

    name: str
    inside: tuple[str, ...]
    start: float
    end: float
    own: float
    """Of it, what no operator inside did."""

    @property
    def kind(self) -> str:
        inside = "\n".join(self.inside)
        for kind, of_name, of_inside in KINDS:
            if of_name and re.search(of_name, self.name, re.IGNORECASE):
                return kind
            if of_inside and re.search(of_inside, inside, re.MULTILINE):
                return kind
        return REST


def breakdown(trace: Path) -> dict[str, Any]:
    """Milliseconds a step by kind of work; `idle` is when the device did nothing at all."""
    events = read_events(trace)
    spans = spans_of(events)
    steps = {e["name"] for e in events if e["name"].startswith("ProfilerStep#")}
    per_step = 1e-3 / max(1, len(steps))
    kinds: dict[str, float] = dict.fromkeys((kind for kind, *_ in KINDS), 0.0)
    for span in spans:
        kinds[span.kind] += span.own * per_step
    first, last = min(s.start for s in spans), max(s.end for s in spans)
    busy = covered((s.start, s.end) for s in spans)
    hiding = covered((s.start, s.end) for s in spans if s.kind != COMMUNICATION)
    return {
        "step_ms": (last - first) * per_step,
        "kinds_ms": kinds,
        "exposed_communication_ms": (busy - hiding) * per_step,
        "idle_ms": (last - first - busy) * per_step,
    }


def read_events(trace: Path) -> list[dict[str, Any]]:
    """The trace's events that last some time."""
    opener = gzip.open if trace.suffix == ".gz" else open
    with opener(trace, "rt") as file:
        return [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X" and "name" in e]


def spans_of(events: Iterable[dict[str, Any]]) -> list[Span]:
    """The kernels of a trace, or, where it has none, the operators.

    What a GPU still did when recording began, it was told in the step before.
    """
    threads = defaultdict(list)
    launches, kernels = {}, []
    for event in events:
        kind = event.get("cat")
        if kind in KERNELS:
            kernels.append(event)
        elif kind in LAUNCHES:
            launches[event.get("args", {}).get("correlation")] = event
            threads[event["tid"]].append(event)
        elif kind in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
    nested = [pair for thread in threads.values() for pair in _nested(thread)]
    if not kernels:
        return [span for event, span in nested if event["cat"] == "cpu_op"]
    launched_inside = {id(event): span.inside for event, span in nested if event["cat"] in LAUNCHES}
    spans = []
    for kernel in kernels:
        correlation = kernel.get("args", {}).get("correlation")
        launch = launches.get(correlation)
        if launch is None and correlation is not None:
            continue
        inside = launched_inside.get(id(launch), ())
        start, length = kernel["ts"], kernel["dur"]
        spans.append(Span(kernel["name"], inside, start, start + length, length))
    return spans


def _nested(thread: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], Span]]:
    """Each event of a thread with its span: what it ran inside, and its time without what is inside."""
    open_events: list[dict[str, Any]] = []
    inner: dict[int, float] = defaultdict(float)
    ordered = sorted(thread, key=lambda e: (e["ts"], -e["dur"]))
    inside = {}
    for event in ordered:
        while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"]:
            open_events.pop()
        inside[id(event)] = tuple(outer["name"] for outer in open_events)
        if open_events and event["cat"] == "cpu_op":
            inner[id(open_events[-1])] += event["dur"]
        open_events.append(event)
    for e in ordered:
        own = max(0.0, e["dur"] - inner[id(e)])
        yield e, Span(e["name"], inside[id(e)], e["ts"], e["ts"] + e["dur"], own)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def breakdown_table(found: Mapping[str, dict[str, Any]]) -> str:
    """A row a kind of work, a column a trace: milliseconds, and the share of the step."""

    def cell(result: dict[str, Any], ms: float) -> str:
        return f"{ms:.2f} ({ms / result['step_ms']:.1%})"

    kinds = next(iter(found.values()))["kinds_ms"]
    rows = [[kind, *(cell(r, r["kinds_ms"][kind]) for r in found.values())] for kind in kinds]
    for name, key in (("communication alone", "exposed_communication_ms"), ("idle", "idle_ms")):
        rows.append([name, *(cell(r, r[key]) for r in found.values())])
    rows.append(["step", *(f"{r['step_ms']:.2f}" for r in found.values())])
    return table(["ms a step", *found], rows)


def sums_by_name(spans: Iterable[Span], num_steps: int = 1) -> list[dict[str, Any]]:
    """Milliseconds and calls a step of each name, the longest first."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(list)
    for span in spans:
        totals[span.name, span.kind].append(span.own)
    sums = [
        {"kind": kind, "name": name, "ms": 1e-3 * sum(own) / num_steps, "calls": len(own) / num_steps}
        for (name, kind), own in totals.items()
    ]
    return sorted(sums, key=lambda named: -named["ms"])


def sums_table(sums: Iterable[dict[str, Any]]) -> str:
    rows = [[s["kind"], f"{s['ms']:.3f}", f"{s['calls']:g}", s["name"][:100]] for s in sums]
    return table(["kind", "ms", "calls", "name"], rows)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--top", type=int, default=0, help="also list what takes the most time, so many rows")
    parser.add_argument("--json", type=Path, help="write the sums there, with the machine that summed them")
    options = parser.parse_args()
    found = {str(trace): breakdown(trace) for trace in options.traces}
    print(breakdown_table(found))
    for trace in options.traces if options.top else ():
        sums = sums_by_name(spans_of(read_events(trace)))
        print(f"\n{trace}, all recorded steps\n{sums_table(sums[: options.top])}")
    write_report(options.json, pick_device(), traces=found)


if __name__ == "__main__":
    main()
