"""What the benchmarks share: ceilings of this machine, timing, real runs of training, tables, reports."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this repository's torchtitan, installed or not

Work = Callable[[], object]


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Work, device: str, in_a_row: int = 1) -> float:
    """What one call takes; on a GPU between two events in its stream.

    Of several in a row, after one more that is not measured: behind it the launches of the first hide, as
    those of the others do.
    """
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(in_a_row):
            work()
        return 1e3 * (time.perf_counter() - start) / in_a_row
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if in_a_row > 1:
        work()
    start.record()
    for _ in range(in_a_row):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / in_a_row


def take_turns(
    works: Mapping[str, Work], device: str, *, warm_up: int, rounds: int, repeats: int, in_a_row: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of a call in every repeat; each round lets all run, so that a slow moment meets all."""
    for work in works.values():
        for _ in range(warm_up):
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name] += [milliseconds(work, device, in_a_row) for _ in range(repeats)]
    return times


def peak_gib(work: Work, device: str) -> float | None:
    """Most memory allocated at a time beyond what was there before; None on a CPU."""
    if device == "cpu":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronize(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def record(work: Work, device: str, file: Path) -> None:
    """Have the profiler record one call, for breakdown.py."""
    with torch.profiler.profile() as profiler:
        work()
        synchronize(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements: the median, and what nine of ten stay above and below."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        tenths = statistics.quantiles(values * 2 if len(values) == 1 else values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])

    def plus(self, term: float) -> "Spread":
        return Spread(*(value + term for value in (self.median, self.low, self.high)))

    def scaled(self, factor: float) -> "Spread":
        return Spread(*(factor * value for value in (self.median, self.low, self.high)))

    def __format__(self, form: str) -> str:
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def ceilings(device: str) -> dict[str, Any]:
    """TFLOP/s of a large matrix product and TB/s of a large copy, read and write counted; medians.

    On a GPU 8192^3 in bf16 and 2 GiB; on a CPU smaller and in fp32.
    """
    size, dtype, length = (8192, torch.bfloat16, 2**29) if device == "cuda" else (512, torch.float32, 2**22)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.randn(length, device=device) for _ in range(2))
    works = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = take_turns(works, device, warm_up=3, rounds=1, repeats=20)
    found = {
        "matmul": f"{size}^3 {dtype}".replace("torch.", ""),
        "matmul_tflops": 2 * size**3 / statistics.median(times["product"]) / 1e9,
        "copy_tb_per_s": 2 * source.nbytes / statistics.median(times["copy"]) / 1e9,
    }
    print(
        f"{device_name(device)}, torch {torch.__version__}: {found['matmul_tflops']:.4g} TFLOP/s for "
        f"{found['matmul']}, {found['copy_tb_per_s']:.3g} TB/s copied",
        flush=True,
    )
    return found


def even_loads(num_rows: int, num_experts: int, device: str) -> torch.Tensor:
    """(E,) int64: rows of each expert where all get as many, or nearly."""
    experts = torch.arange(num_experts, device=device)
    return num_rows // num_experts + (experts < num_rows % num_experts).long()


def grouped_products(w13: torch.Tensor, w2: torch.Tensor, counts: torch.Tensor) -> Work:
    """The grouped products of experts alone, forward and backward.

    w13 (E, 2F, D), w2 (E, D, F), counts (E,) int64 rows of each. 18 * rows * D * F operations.
    """
    _, dim, ffn_dim = w2.shape
    ends = counts.cumsum(0).int()
    rows, z, act = (
        torch.randn(int(counts.sum()), width, device=w2.device, dtype=w2.dtype)
        for width in (dim, 2 * ffn_dim, ffn_dim)
    )

    def run():
        F.grouped_mm(rows, w13.mT, offs=ends)
        F.grouped_mm(act, w2.mT, offs=ends)
        F.grouped_mm(rows, w2, offs=ends)
        F.grouped_mm(z, w13, offs=ends)
        F.grouped_mm(rows.t(), act, offs=ends)
        F.grouped_mm(z.t(), rows, offs=ends)

    return run


class RunFailed(Exception):
    """A run of training did not end well; the message is what it said last."""


@dataclass(frozen=True)
class Run:
    """A run of torchtitan.train that ended well."""

    records: list[dict[str, Any]]
    """Its training records, by step."""
    output: str
    seconds_to_ready: float
    """From starting the first process to the end of the first step."""


def train(
    argv: Sequence[str], num_ranks: int = 1, environment: Mapping[str, str] | None = None, folder: str = ""
) -> Run:
    """Train in processes of their own, as run_train.sh starts them; every step is logged.

    The run's files go to `folder`, or are deleted where none is given. Raises RunFailed.
    """
    if not folder:
        with tempfile.TemporaryDirectory(prefix="torchtitan_benchmark_") as folder:
            return train(argv, num_ranks, environment, folder)
    launcher = f"torchtitan.launcher --nproc-per-node {num_ranks} --local-ranks-filter 0 --role rank "
    launcher += "--tee 3 --rdzv-backend c10d --rdzv-endpoint localhost:0 -m"
    command = [sys.executable, "-m", *(launcher.split() if num_ranks > 1 else []), "torchtitan.train"]
    command += [*argv, f"--job.dump_folder={folder}", "--metrics.log_freq=1"]
    defaults = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "NGPU": str(num_ranks)}
    start, ready, lines = time.perf_counter(), 0.0, []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | defaults | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if not ready and "s from the start: " in line:
                ready = time.perf_counter() - start
    if process.returncode:
        errors = [line for line in lines if "Error" in line] or lines
        raise RunFailed(f"status {process.returncode}: {''.join(errors[-3:])[-500:]}")
    text = Path(folder, "metrics.jsonl").read_text()
    records = [record for record in map(json.loads, text.splitlines()) if "loss" in record]
    return Run(records, "".join(lines), ready)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines
    )


def write_report(path: Path | None, device: str, **results: object) -> None:
    """Write what was measured, on what and when, as JSON; without a path, nothing."""
    if path is None:
        return
    report = {
        "device": device_name(device),
        "torch": torch.__version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    path.write_text(json.dumps(report | results, indent=1, default=vars) + "\n")
