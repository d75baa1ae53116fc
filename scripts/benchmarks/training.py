"""Training throughput of this machine, dense models and models with experts.

    python scripts/benchmarks/training.py l8x8:compile:none:4 q6:compile:op:8 ds14:compile:op:4:ep2

A case is model:variant:recomputation:sequences, where sequences are those of a data-parallel rank and
step, and where wanted a layout (fsdp2, tp2, ep2, tp2ep2, pp2, kv2, alltoall2, heads2 or several in a
row; without one, one GPU) and the routing of experts (natural, or forced: each gets as many tokens).

Each case is a run of torchtitan.train in processes of its own, read from its metrics.jsonl; figures are
medians over the second half of its steps. Ceilings are measured in the same call.
"""

import argparse
import re
import tempfile
from math import prod
from pathlib import Path

from common import (
    RunFailed,
    Spread,
    ceilings,
    grouped_products,
    pick_device,
    table,
    take_turns,
    train,
    write_report,
)

import torch

from breakdown import breakdown, breakdown_table
from torchtitan.config.manager import load_config
from torchtitan.models.registry import model_config

DEEPSEEK = ["--model.name=deepseek_v3", "--model.flavor=16B"]
MODELS = {
    "l1b": ["--model.flavor=1B", "--model.overrides.enable_weight_tying=false"],
    "l8x8": ["--model.flavor=8B", "--model.overrides.n_layers=8"],
    "l8b": ["--model.flavor=8B"],
    "q6": ["--model.name=qwen3", "--model.flavor=30B-A3B", "--model.overrides.n_layers=6"]
    + ["--model.overrides.vocab_size=32768"],
    "ds6": [*DEEPSEEK, "--model.overrides.n_layers=6"],
    "ds14": [*DEEPSEEK, "--model.overrides.n_layers=14"],
    # Small enough for a rehearsal on a CPU:
    "debug": ["--model.overrides.n_layers=1"],
    "debug_moe": ["--model.name=qwen3", "--model.flavor=debugmodel_moe", "--model.overrides.n_layers=1"],
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
    "ep": ["--parallelism.expert_parallel_degree={}"],
    "pp": ["--parallelism.pipeline_parallel_degree={}"],
    "kv": [CONTEXT],
    "alltoall": [CONTEXT, "--parallelism.context_parallel_rotate_method=alltoall"],
    "heads": [CONTEXT, "--parallelism.context_parallel_method=heads"],
}
ROUTING = {"natural": [], "forced": ["--debug.moe_force_load_balance"]}
WARM_UP, RECORDED = 2, 1
"""Steps after those measured, where one is to be recorded by the profiler."""


def parse_layout(layout: str) -> tuple[list[str], int]:
    """The options of a layout such as tp2ep4, and how many GPUs it takes.

    Experts are spread over the ranks there are: expert parallelism adds some only where they are too few.
    """
    parts = [(name, int(degree)) for name, degree in re.findall(r"([a-z]+)(\d+)", layout)]
    if "".join(f"{name}{degree}" for name, degree in parts) != layout or not {*dict(parts)} <= {*LAYOUTS}:
        raise SystemExit(f"layout {layout!r}: parts are {', '.join(LAYOUTS)}, each with a number")
    options = [option.format(degree) for name, degree in parts for option in LAYOUTS[name]]
    degrees = dict(parts)
    stages, experts = degrees.pop("pp", 1), degrees.pop("ep", 1)
    return options, stages * max(prod(degrees.values()), experts)


def measure(case: str, options: argparse.Namespace) -> dict[str, object]:
    """Run one case and summarise the second half of its steps."""
    model, variant, recomputation, batch, *rest = case.split(":")
    routing = rest.pop() if rest and rest[-1] in ROUTING else "natural"
    layout = rest[0] if rest else "fsdp1"
    layout_options, num_gpus = parse_layout(layout)
    more_steps = WARM_UP + RECORDED if options.traces else 0
    argv = [
        *MODELS[model], *VARIANTS[variant], *RECOMPUTATION[recomputation], *layout_options, *ROUTING[routing],
        f"--training.local_batch_size={batch}", f"--training.seq_len={options.seq_len}",
        f"--training.steps={options.steps + more_steps}", "--debug.seed=0", *options.extra.split(),
    ]  # fmt: skip
    if options.traces:
        argv += [
            "--profiling.enable_profiling", f"--profiling.profile_freq={options.steps + more_steps}",
            f"--profiling.profiler_warmup={WARM_UP}", f"--profiling.profiler_active={RECORDED}",
        ]  # fmt: skip
    result: dict[str, object] = {"case": case, "model": model, "layout": layout, "num_gpus": num_gpus}
    config = load_config(MODELS[model]).model
    has_experts = model_config(config.name, config.flavor, config.overrides).moe is not None
    result["routing"] = routing if has_experts else None
    with tempfile.TemporaryDirectory(prefix="torchtitan_benchmark_") as folder:
        try:
            run = train(argv, num_gpus, folder=folder)
        except RunFailed as error:
            return result | {"failed": str(error)}
        if options.traces:
            options.traces.mkdir(parents=True, exist_ok=True)
            [trace] = Path(folder).glob("profile_traces/*/rank_0.json.gz")
            kept = options.traces / f"{case.replace(':', '-')}.json.gz"
            kept.write_bytes(trace.read_bytes())
            result["breakdown"] = breakdown(kept)
    records = run.records[options.steps // 2 : options.steps]

    def spread(key: str, factor: float = 1.0) -> Spread | None:
        values = [factor * record[key] for record in records if key in record]
        return Spread.of(values) if values else None

    return result | {
        "tokens_per_second_per_gpu": spread("tokens_per_second_per_device"),
        "step_ms": spread("seconds_per_step", 1e3),
        "forward_backward_ms": spread("forward_backward_seconds_per_step", 1e3),
        "data_ms": spread("data_seconds_per_step", 1e3),
        "mfu_full_attention": spread("mfu_full_attention"),
        "mfu_causal_attention": spread("mfu_causal_attention"),
        "memory_gib": records[-1]["memory"],
        "loss": records[-1]["loss"],
        "seconds_to_first_step": run.seconds_to_ready,
    }


def experts_ceiling(model: str, num_tokens: int, device: str) -> dict[str, object] | None:
    """TFLOP/s of the grouped products alone, for an expert layer of this model; None if it has none."""
    config = load_config(MODELS[model]).model
    config = model_config(config.name, config.flavor, config.overrides)
    if config.moe is None:
        return None
    moe, num_rows = config.moe, num_tokens * config.moe.top_k
    shape = (moe.num_experts, config.dim, moe.ffn_dim)
    w2 = torch.randn(shape, device=device, dtype=torch.bfloat16)
    w13 = torch.randn(moe.num_experts, 2 * moe.ffn_dim, config.dim, device=device, dtype=torch.bfloat16)
    works = {"products": grouped_products(w13, w2, num_rows)}
    milliseconds = Spread.of(
        take_turns(works, device, warm_up=3, rounds=1, repeats=20 if device == "cuda" else 1)["products"]
    )
    tflops = 18 * num_rows * config.dim * moe.ffn_dim / milliseconds.median / 1e9
    return {"model": model, "tokens": num_tokens, "ms": milliseconds, "tflops": tflops}


def print_cases(results: list[dict]) -> None:
    headings = ("case", "routing", "tokens/s a GPU", "step, ms", "forward and backward", "data")
    headings += ("MFU full", "MFU causal", "peak GiB", "to first step, s")
    rows = []
    for r in results:
        if "failed" in r:
            rows.append([r["case"], r["routing"], "failed", *[None] * 7])
            continue
        mfu = [r[key] and f"{r[key].median:.1f} %" for key in ("mfu_full_attention", "mfu_causal_attention")]
        rows.append(
            [r["case"], r["routing"], format(r["tokens_per_second_per_gpu"], ",.0f")]
            + [format(r["step_ms"], ".1f"), f"{r['forward_backward_ms'].median:.1f}"]
            + [f"{r['data_ms'].median:.1f}", *mfu, f"{r['memory_gib']:.1f}"]
            + [f"{r['seconds_to_first_step']:.0f}"]
        )
    print(table(headings, rows))


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names = {"models": MODELS, "variants": VARIANTS, "recomputation": RECOMPUTATION}
    known = "; ".join(f"{kind} {', '.join(table)}" for kind, table in names.items())
    parser.add_argument("cases", nargs="+", metavar="case", help=known)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--traces", type=Path, help="record a step of each case, keep it there, break it down")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--extra", default="", help="more arguments for every run, as --extra=...")
    return parser.parse_args()


def main() -> None:
    options, device = arguments(), pick_device()
    found = ceilings(device)
    sizes = {(case.split(":")[0], int(case.split(":")[3]) * options.seq_len) for case in options.cases}
    experts = [experts_ceiling(*size, device) for size in sorted(sizes)]
    found["experts"] = [ceiling for ceiling in experts if ceiling is not None]
    for c in found["experts"]:
        print(f"{c['model']}, {c['tokens']} tokens: {c['tflops']:.4g} TFLOP/s for its grouped products alone")
    if device == "cuda":
        torch.cuda.empty_cache()  # the runs need it
    results = []
    for case in options.cases:
        results.append(result := measure(case, options))
        print(f"{case}: {result.get('failed', 'done')}", flush=True)
        write_report(options.json, device, ceilings=found, cases=results)
    print_cases(results)
    recorded = {r["case"]: r["breakdown"] for r in results if "breakdown" in r}
    if recorded:
        print(breakdown_table(recorded))


if __name__ == "__main__":
    main()
