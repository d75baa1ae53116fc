"""Training throughput of this machine, dense models and models with experts.

    python scripts/benchmarks/training.py l8x8:compile:none:4 q6:compile:op:8 ds14:compile:op:4:ep2

A case is model:variant:recomputation:sequences, where sequences are those of a data-parallel rank and
step, and where wanted a layout (fsdp2, tp2, ep2, tp2ep2, pp2, kv2, alltoall2, heads2 or several in a
row; without one, one GPU) and the routing of experts (natural, or forced: each gets as many tokens).
All variants but `eager` are compiled. In `float8_experts` experts alone multiply in float8, in
`float8_experts_exchange` (by another recipe) their rows travel so too, with a layout that has ep, in
`float8_all` Linear layers and the head multiply so as well.

Each case is a run of torchtitan.train in processes of its own, read from its metrics.jsonl; figures are
medians over the second half of its steps; loss is the last one's. Ceilings are measured in the same call.
"""

import argparse
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from common import (
    Run,
    RunFailed,
    Spread,
    ceilings,
    even_loads,
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
from torchtitan.models.decoder import DecoderConfig
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
LINEAR, EXPERTS = "quantize.linear.float8", "quantize.grouped_mm.float8"
FLOAT8_HEAD = ["--compile.enable", f"--model.converters={LINEAR}"]
FLOAT8 = [*FLOAT8_HEAD, "--quantize.linear.float8.filter_fqns=output"]
RECIPE = "--quantize.linear.float8.recipe_name={}"
GATHERED = [
    "--quantize.linear.float8.enable_fsdp_float8_all_gather",
    "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
]


def experts_in_float8(recipe: str, *converters: str) -> list[str]:
    return [
        "--compile.enable", f"--model.converters={','.join([*converters, EXPERTS])}",
        f"--{EXPERTS}.fqns=experts", f"--{EXPERTS}.recipe_name={recipe}",
    ]  # fmt: skip


VARIANTS = {
    "compile": ["--compile.enable"],
    "eager": [],
    "float8_tensorwise": [*FLOAT8, RECIPE.format("tensorwise")],
    "float8_gathered": [*FLOAT8, RECIPE.format("tensorwise"), *GATHERED],
    "float8_rowwise": [*FLOAT8, RECIPE.format("rowwise")],
    "float8_gw_hp": [*FLOAT8, RECIPE.format("rowwise_with_gw_hp")],
    "float8_tensorwise_head": [*FLOAT8_HEAD, RECIPE.format("tensorwise")],
    "float8_rowwise_head": [*FLOAT8_HEAD, RECIPE.format("rowwise")],
    "float8_experts": experts_in_float8("rowwise_with_gw_hp"),
    "float8_experts_exchange": [*experts_in_float8("rowwise"), f"--{EXPERTS}.exchange_in_float8"],
    "float8_all": [*experts_in_float8("rowwise_with_gw_hp", LINEAR), RECIPE.format("tensorwise")],
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


@dataclass(frozen=True)
class Case:
    """What is measured: a run's model, how it is computed, and over how many GPUs."""

    name: str
    model: str
    variant: str
    recomputation: str
    batch: int
    degrees: dict[str, int]
    routing: str

    @classmethod
    def parse(cls, name: str) -> "Case":
        """From the words of the command line; raises ValueError with what is wrong."""
        words = name.split(":")
        routing = words.pop() if words[-1] in ROUTING else "natural"
        if len(words) not in (4, 5):
            raise ValueError(f"{name}: a case is model:variant:recomputation:sequences[:layout][:routing]")
        for word, known in zip(words, (MODELS, VARIANTS, RECOMPUTATION), strict=False):
            if word not in known:
                raise ValueError(f"{name}: {word} is none of {', '.join(known)}")
        layout = words[4] if len(words) == 5 else "fsdp1"
        parts = re.findall(r"([a-z]+)(\d+)", layout)
        if "".join(map("".join, parts)) != layout or not {part for part, _ in parts} <= {*LAYOUTS}:
            raise ValueError(f"{name}: a layout is some of {', '.join(LAYOUTS)}, each with a degree")
        degrees = {part: int(degree) for part, degree in parts}
        return cls(name, *words[:3], int(words[3]), degrees, routing)

    @property
    def num_gpus(self) -> int:
        """Experts are spread over the ranks there are, and ask for more only where they are too few."""
        dense = prod(degree for part, degree in self.degrees.items() if part not in ("pp", "ep"))
        return self.degrees.get("pp", 1) * max(dense, self.degrees.get("ep", 1))

    @property
    def options(self) -> list[str]:
        layout = [o.format(degree) for part, degree in self.degrees.items() for o in LAYOUTS[part]]
        return [
            *MODELS[self.model], *VARIANTS[self.variant], *RECOMPUTATION[self.recomputation], *layout,
            *ROUTING[self.routing], f"--training.local_batch_size={self.batch}",
        ]  # fmt: skip

    @property
    def config(self) -> DecoderConfig:
        model = load_config(MODELS[self.model]).model
        return model_config(model.name, model.flavor, model.overrides)


def measure(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """Run one case and summarise the second half of its steps."""
    num_steps = args.steps + (WARM_UP + RECORDED if args.traces else 0)
    argv = [*case.options, f"--training.seq_len={args.seq_len}", f"--training.steps={num_steps}"]
    argv += ["--debug.seed=0", *args.extra.split()]
    if args.traces:
        argv += [
            "--profiling.enable_profiling", f"--profiling.profile_freq={num_steps}",
            f"--profiling.profiler_warmup={WARM_UP}", f"--profiling.profiler_active={RECORDED}",
        ]  # fmt: skip
    routing = case.routing if case.config.moe else None
    result: dict[str, object] = {"case": case.name, "num_gpus": case.num_gpus, "routing": routing}
    with tempfile.TemporaryDirectory(prefix="torchtitan_benchmark_") as folder:
        try:
            run = train(argv, case.num_gpus, folder=folder)
        except RunFailed as error:
            return result | {"failed": str(error)}
        if args.traces:
            args.traces.mkdir(parents=True, exist_ok=True)
            [trace] = Path(folder).glob("profile_traces/*/rank_0.json.gz")
            kept = args.traces / f"{case.name.replace(':', '-')}.json.gz"
            kept.write_bytes(trace.read_bytes())
            result["breakdown"] = breakdown(kept)
    return result | summary(run, args.steps)


def summary(run: Run, num_steps: int) -> dict[str, object]:
    """Of the second half of the steps, those that were recorded left out."""
    records = run.records[num_steps // 2 : num_steps]

    def spread(key: str, factor: float = 1.0) -> Spread | None:
        values = [factor * record[key] for record in records if key in record]
        return Spread.of(values) if values else None

    return {
        "tokens_per_second_per_gpu": spread("tokens_per_second_per_device"),
        "step_ms": spread("seconds_per_step", 1e3),
        "forward_backward_ms": spread("forward_backward_seconds_per_step", 1e3),
        "data_ms": spread("data_seconds_per_step", 1e3),
        "mfu_full_attention": spread("mfu_full_attention"),
        "mfu_causal_attention": spread("mfu_causal_attention"),
        "memory_gib": records[-1]["memory"],
        "loss": records[-1]["loss"],
        "losses": [record["loss"] for record in run.records],
        "seconds_to_first_step": run.seconds_to_ready,
    }


def experts_ceiling(case: Case, seq_len: int, device: str) -> dict[str, object]:
    """TFLOP/s of the grouped products alone, of a layer of this case's experts and a microbatch.

    Loads are even, whatever the case's routing.
    """
    moe, dim = case.config.moe, case.config.dim
    num_rows = case.batch * seq_len * moe.top_k
    w2 = torch.randn(moe.num_experts, dim, moe.ffn_dim, device=device, dtype=torch.bfloat16)
    w13 = torch.randn(moe.num_experts, 2 * moe.ffn_dim, dim, device=device, dtype=torch.bfloat16)
    works = {"products": grouped_products(w13, w2, even_loads(num_rows, moe.num_experts, device))}
    repeats = 20 if device == "cuda" else 1
    times = take_turns(works, device, warm_up=repeats // 5, rounds=1, repeats=repeats)
    ms = Spread.of(times["products"])
    tflops = 18 * num_rows * dim * moe.ffn_dim / ms.median / 1e9
    tokens = f"{case.model}, {case.batch} x {seq_len} tokens"
    print(f"{tokens}: {tflops:.4g} TFLOP/s for its grouped products alone, even loads")
    return {"model": case.model, "rows": num_rows, "loads": "even", "ms": ms, "tflops": tflops}


def print_cases(results: list[dict]) -> None:
    headings = ("case", "routing", "tokens/s a GPU", "step, ms", "forward and backward", "data")
    headings += ("MFU full", "MFU causal", "peak GiB", "loss", "to first step, s")
    rows = []
    for r in results:
        if "failed" in r:
            rows.append([r["case"], r["routing"], "failed", *[None] * 8])
            continue
        mfu = [r[key] and f"{r[key].median:.1f} %" for key in ("mfu_full_attention", "mfu_causal_attention")]
        rows.append(
            [r["case"], r["routing"], format(r["tokens_per_second_per_gpu"], ",.0f")]
            + [format(r["step_ms"], ".1f"), f"{r['forward_backward_ms'].median:.1f}"]
            + [f"{r['data_ms'].median:.1f}", *mfu, f"{r['memory_gib']:.1f}"]
            + [f"{r['loss']:.3f}", f"{r['seconds_to_first_step']:.0f}"]
        )
    print(table(headings, rows))


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names = {"models": MODELS, "variants": VARIANTS, "recomputation": RECOMPUTATION, "layouts": LAYOUTS}
    names["routings"] = ROUTING
    known = "; ".join(f"{kind}: {', '.join(values)}" for kind, values in names.items())
    parser.add_argument("words", nargs="+", metavar="case", help=known)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--traces", type=Path, help="record a step of each case, keep it there, break it down")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--extra", default="", help="more arguments for every run, as --extra=...")
    return with_cases(parser, Case.parse)


def with_cases(parser: argparse.ArgumentParser, parse: Callable[[str], Case]) -> argparse.Namespace:
    """The command line's arguments, its words as `cases`; ends the program where one is none."""
    args = parser.parse_args()
    try:
        args.cases = [parse(name) for name in args.words]
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args, device = arguments(), pick_device()
    found = ceilings(device)
    with_experts = {(case.model, case.batch): case for case in args.cases if case.config.moe}
    found["experts"] = [experts_ceiling(case, args.seq_len, device) for case in with_experts.values()]
    if device == "cuda":
        torch.cuda.empty_cache()  # the runs need it
    results = []
    for case in args.cases:
        results.append(result := measure(case, args))
        print(f"{case.name}: {result.get('failed', 'done')}", flush=True)
        write_report(args.json, device, ceilings=found, cases=results)
    print_cases(results)
    recorded = {r["case"]: r["breakdown"] for r in results if "breakdown" in r}
    if recorded:
        print(breakdown_table(recorded))


if __name__ == "__main__":
    main()
