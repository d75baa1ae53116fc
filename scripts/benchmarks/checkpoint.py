"""How long do checkpoints stop training, how fast are they written and loaded, in how much memory?

`python scripts/benchmarks/checkpoint.py [--factor 64] [--dtype float32] [--repeats 5] [--folder F]`

The state is that of Llama 3 8B, weights and both moments, with every tensor's rows divided by the
factor. One process, on the GPU where there is one; each mode in a process of its own.
"""

import argparse
import json
import logging
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Spread, device_name, synchronize, table, write_report

import torch

from torchtitan.checkpoint import storage
from torchtitan.checkpoint.manager import CheckpointManager, find_altered
from torchtitan.config.schema import Checkpoint, Comm
from torchtitan.distributed.comm import World, init_process_group, pick_device
from torchtitan.logging import logger
from torchtitan.models.llama3 import FLAVORS

MODES = ("disabled", "async", "async_with_pinned_mem")
GIB = 2**30


def state(factor: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors by name in the 8B's shapes, rows divided by `factor`."""
    with torch.device("meta"):
        model = FLAVORS["8B"].build()
    return {
        name: torch.randn(-(-len(p) // factor), *p.shape[1:], dtype=dtype, device=device)
        for name, p in model.named_parameters()
    }


def measure(mode: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of stalls, whole saves, checks of checksums and loads; bytes; peak of host memory."""
    logger.setLevel(logging.WARNING)
    device = pick_device(World())
    folder = Path(args.folder or tempfile.gettempdir()) / f"checkpoint_benchmark_{mode}"
    init_process_group(Comm(trace_buf_size=0), folder, device)
    dtype = getattr(torch, args.dtype)
    weights = state(args.factor, dtype, device)
    moments = {
        name: {"exp_avg": torch.rand_like(w), "exp_avg_sq": torch.rand_like(w)}
        for name, w in weights.items()
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    config = Checkpoint(enable=True, async_mode=mode, keep_latest_k=0)
    manager = CheckpointManager(config, folder, lambda: weights, moments)
    result: dict[str, list[float]] = {"stall": [], "save": [], "check": [], "load": []}
    for step in range(1, args.repeats + 2):
        shutil.rmtree(manager.folder, ignore_errors=True)
        synchronize(device.type)
        start = time.perf_counter()
        manager.save(step, {})
        result["stall"].append(time.perf_counter() - start)
        manager.writer.finish()
        result["save"].append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    checkpoint = manager.folder / f"step-{step}"
    for _ in range(args.repeats if mode == "disabled" else 0):
        start = time.perf_counter()
        assert not find_altered(checkpoint)
        result["check"].append(time.perf_counter() - start)
        start = time.perf_counter()
        manager.load(checkpoint)
        synchronize(device.type)
        result["load"].append(time.perf_counter() - start)
    size = storage.total_bytes(storage.read_manifest(checkpoint)["files"].values()) / GIB
    shutil.rmtree(folder)
    # The first save allocates the buffer, and warms up.
    first = {"first_stall": [result["stall"].pop(0)], "first_save": [result["save"].pop(0)]}
    return result | first | {"gib": [size], "host_gib": [peak - before]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factor", type=int, default=64, help="rows of every tensor are 1 / factor")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--mode", choices=MODES, help="measure one, and print JSON")
    args = parser.parse_args()
    if args.mode is not None:
        print(json.dumps(measure(args.mode, args)))
        return
    device = pick_device(World())
    print(f"Llama 3 8B / {args.factor}, {args.dtype}, on {device_name(device.type)}, {args.repeats} repeats")
    rows, results = [], {}
    for mode in MODES if device.type == "cuda" else MODES[:-1]:
        command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        found = results[mode] = json.loads(run.stdout)
        size = found["gib"][0]
        rows.append(
            [mode, f"{size:.2f}", format(Spread.of(found["stall"]), ".2f"), f"{found['first_stall'][0]:.2f}"]
            + [format(Spread.of(found["save"]), ".2f"), f"{size / statistics.median(found['save']):.2f}"]
            + [f"{found['host_gib'][0]:.2f}"]
        )
    headings = ("mode", "GiB", "stall, s", "first", "whole save, s", "GiB/s", "host memory, GiB")
    print(table(headings, rows))
    check, load = (Spread.of(results["disabled"][key]) for key in ("check", "load"))
    print(f"Reading: checksums {check:.2f} s, then load {load:.2f} s")
    write_report(args.json, device.type, results=results)


if __name__ == "__main__":
    main()
