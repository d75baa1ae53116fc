"""How long from starting a run to the end of its first step, and where does that time go?

    python scripts/benchmarks/startup.py --ranks 1 2

The debug model: eager, compiled with an empty cache, and compiled again with what that left behind. Runs
are started as run_train.sh starts them, several times in turn; each tells how long its parts took.
"""

import argparse
import re
import statistics
import tempfile
from pathlib import Path

from common import ROOT, Spread, pick_device, table, train, write_report

CONFIG = "train_configs/llama3/debug_model.toml"
LAUNCHER = "launcher"
PARTS = (LAUNCHER, "imports", "checks", "process group", "model and data", "first step")


def start(num_ranks: int, options: list[str], cache: str) -> dict[str, float]:
    """Seconds in all, and of each part of rank 0's start; before it there is the launcher's."""
    argv = [f"--job.config_file={ROOT / CONFIG}", "--training.steps=1", *options]
    run = train(argv, num_ranks, {"TORCHINDUCTOR_CACHE_DIR": cache})
    total, parts = re.search(r"ready ([\d.]+) s from the start: (.*)", run.output).groups()
    seconds = {name: float(value) for name, value in re.findall(r"([a-z][a-z ]*) ([\d.]+)", parts)}
    return {"total": run.seconds_to_ready, LAUNCHER: run.seconds_to_ready - float(total), **seconds}


def measure(num_ranks: int, repeats: int, options: list[str]) -> dict[str, list[dict[str, float]]]:
    """The starts of each kind, in turn; every cold one has a cache of its own."""
    starts: dict[str, list[dict[str, float]]] = {"eager": [], "compiled, cold": [], "compiled, warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="torchtitan_compiled_") as cache:
            for kind in starts:
                compiled = ["--compile.enable"] if kind != "eager" else []
                starts[kind].append(start(num_ranks, [*compiled, *options], cache))
                print(f"{num_ranks} ranks, {kind}: {starts[kind][-1]['total']:.1f} s", flush=True)
    return starts


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--extra", default="", help="more arguments for every run, as --extra=...")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    rows, found = [], []
    for num_ranks in args.ranks:
        for kind, starts in measure(num_ranks, args.repeats, args.extra.split()).items():
            medians = [statistics.median(start[part] for start in starts) for part in PARTS]
            total = Spread.of(start["total"] for start in starts)
            rows.append([num_ranks, kind, format(total, ".1f"), *(f"{m:.1f}" for m in medians)])
            found.append({"ranks": num_ranks, "start": kind, "total": total, "starts": starts})
    print(table(("ranks", "start", "seconds in all", *PARTS), rows))
    write_report(args.json, pick_device(), starts=found)


if __name__ == "__main__":
    main()
