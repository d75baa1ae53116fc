"""Dense training throughput of this machine: `python scripts/benchmarks/dense.py --help`.

Each case is a real run of torchtitan.train in a process of its own, read from its metrics.jsonl;
the ceilings (a large matrix product, a large copy) are measured in the same call.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

MODELS = {
    "l1b": ["--model.flavor=1B", "--model.overrides.enable_weight_tying=false"],
    "l8x8": ["--model.flavor=8B", "--model.overrides.n_layers=8"],
    "l8b": ["--model.flavor=8B"],
}
VARIANTS = {
    "compile": ["--compile.enable"],
    "eager": [],
}
RECOMPUTATION = {
    "none": ["--activation_checkpoint.mode=none"],
    "op": ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"],
    "full": ["--activation_checkpoint.mode=full"],
}  # fmt: skip
CONTEXT = "--parallelism.context_parallel_degree={}"
LAYOUTS = {
    "fsdp": [],
    "tp": ["--parallelism.tensor_parallel_degree={}"],
    "kv": [CONTEXT],
    "alltoall": [CONTEXT, "--parallelism.context_parallel_rotate_method=alltoall"],
    "heads": [CONTEXT, "--parallelism.context_parallel_method=heads"],
}


def ceilings() -> dict[str, float]:
    """TFLOP/s of an 8192^3 bf16 product and TB/s of a copy, read and write counted; medians."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.randn(2**29, device="cuda") for _ in range(2))
    product = _seconds(lambda: a @ b)
    copy = _seconds(lambda: target.copy_(source))
    return {
        "matmul_tflops": 2 * 8192**3 / product / 1e12,
        "copy_tb_per_s": 2 * source.nbytes / copy / 1e12,
    }


def _seconds(work, repeats: int = 20) -> float:
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure(case: str, steps: int, seq_len: int, extra: list[str]) -> dict[str, object]:
    """Run one case, as `--help` spells it, and summarise the second half of its steps."""
    model, variant, recomputation, batch, *layout = case.split(":")
    layout, num_gpus = re.fullmatch(r"([a-z]+)(\d+)", layout[0] if layout else "fsdp1").groups()
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            *MODELS[model], *VARIANTS[variant], *RECOMPUTATION[recomputation], *extra,
            *(option.format(num_gpus) for option in LAYOUTS[layout]),
            f"--training.local_batch_size={batch}", f"--training.seq_len={seq_len}",
            f"--training.steps={steps}", "--metrics.log_freq=1", f"--job.dump_folder={folder}",
            "--debug.seed=0",
        ]  # fmt: skip
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-m", *_launcher(num_gpus), "torchtitan.train", *argv],
            capture_output=True, text=True,
            env=os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "NGPU": num_gpus},
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if run.returncode:
            error = [line for line in run.stderr.splitlines() if "Error" in line][-1:]
            return {"case": case, "failed": "".join(error)[:200] or run.stderr[-300:]}
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][steps // 2 :]
    speeds = [record["tokens_per_second_per_device"] for record in records]
    return {
        "case": case,
        "tokens_per_second_per_gpu": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "step_ms": 1e3 * statistics.median(r["seconds_per_step"] for r in records),
        "mfu_full_attention": statistics.median(r["mfu_full_attention"] for r in records),
        "mfu_causal_attention": statistics.median(r["mfu_causal_attention"] for r in records),
        "memory_gib": records[-1]["memory"],
        "loss": records[-1]["loss"],
        "seconds_in_all": seconds,
    }


def _launcher(num_gpus: str) -> list[str]:
    """What comes before the module to run: nothing for one GPU."""
    if num_gpus == "1":
        return []
    launch = f"--nproc-per-node {num_gpus} --local-ranks-filter 0 --role rank --tee 3"
    return f"torchtitan.launcher {launch} --rdzv-backend c10d --rdzv-endpoint localhost:0 -m".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", help=(
        "model:variant:recomputation:sequences a data-parallel rank[:layout], such as l8x8:compile:none:4 "
        "or l8b:compile:op:4:tp2; layouts are fsdp1 (the default), fsdp2, tp2, and kv2, alltoall2, heads2 "
        "of context parallelism"
    ))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--extra", default="", help="more arguments for every run")
    options = parser.parse_args()
    results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **ceilings()}
    torch.cuda.empty_cache()
    print(results, flush=True)
    results["cases"] = []
    for case in options.cases:
        result = measure(case, options.steps, options.seq_len, options.extra.split())
        results["cases"].append(result)
        print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
