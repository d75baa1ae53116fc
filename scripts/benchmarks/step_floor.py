"""What a dense training step cannot be faster than on this GPU, in bf16 with its libraries.

    python scripts/benchmarks/step_floor.py l1b:10 l8x8:4
    python scripts/benchmarks/step_floor.py debug:1 --seq-len 16   # a rehearsal on a CPU, in fp32

A case is a dense model of training.py and the sequences of a step. Nothing is trained: on random tensors
run, in a step's order, all its matrix products (`products`: forward of all layers, the head's three in
chunks by training's own code, backward of all layers), attention forward and backward by the kernel that
training takes (`attention`), and the two together (`both`). `passes` and `optimizer` are the fewest bytes
that the rest must move, at the copy speed that is measured in the same call; step_parts.py counts them.

`floor` is the sum. A GPU that rests from products during passes may multiply faster than in products alone,
so `in one go` measures a step that has copies of as many bytes in it: after each layer, after the head and
at the end. Both presume that no pass runs beside a product, or at more than a copy's speed, and both stand
a second time with q, k, v as one product and gate, up as another. TFLOP/s count attention's causal half,
backward as twice forward. A second table has attention by each backend alone; training takes the first
of cuDNN, flash and efficient attention that can run.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import Spread, Work, ceilings, pick_device, table, take_turns, write_report

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from step_parts import (
    PARTS,
    Attention,
    Linear,
    Passes,
    fewest_bytes,
    head,
    linear_sizes,
    one_by_one,
    operations,
    steps,
)
from torchtitan.models.attention import SDPA_PRIORITY
from training import MODELS, Case, with_cases

NO_KERNEL = ("No available kernel", "No viable backend")
"""How the errors of torch 2.11 and 2.13 begin where a backend cannot run."""


def kind_on(device: str) -> dict[str, Any]:
    return {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}


def turns(works: dict[Any, Work], device: str, args: argparse.Namespace) -> dict[Any, Spread]:
    """Milliseconds of each."""
    counts = {"rounds": args.rounds, "repeats": args.repeats, "in_a_row": args.in_a_row}
    times = take_turns(works, device, warm_up=1, **counts)
    return {name: Spread.of(values) for name, values in times.items()}


def measure(case: Case, copy_speed: float, device: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A result with the model's products and one with them joined; `copy_speed` in TB/s."""
    config, num_tokens, kind = case.config, case.batch * args.seq_len, kind_on(device)
    attention, of_head = Attention(config, case.batch, args.seq_len, **kind), head(config, num_tokens, **kind)
    works, moved = {}, {}
    for joined in (False, True):
        moved[joined] = fewest_bytes(config, num_tokens, joined)
        sizes = linear_sizes(config, joined)
        linears = [[Linear(num_tokens, *size, **kind) for size in part] for part in sizes]
        parts = steps(config, attention, of_head, Passes(moved[joined], device), linears)
        works |= {(joined, name): work for name, work in parts.items()}
    with sdpa_kernel(SDPA_PRIORITY, set_priority=True):
        times = turns(works, device, args)
    done = operations(config, num_tokens, args.seq_len)
    results = []
    for joined, of in moved.items():
        ms = {name: times[joined, name] for name in PARTS}
        passes = (of["loss"] + config.n_layers * (of["forward"] + of["backward"])) / copy_speed / 1e9
        optimizer = of["optimizer"] / copy_speed / 1e9
        result = {"case": case.name, "joined": joined, "tokens": num_tokens, "operations": done, "bytes": of}
        result |= {"ms": ms, "tflops": {name: done[name] / ms[name].median / 1e9 for name in done}}
        result |= {"passes_ms": passes, "optimizer_ms": optimizer}
        for name, floor in (("floor", ms["both"].plus(passes + optimizer)), ("in_one_go", ms["in one go"])):
            result |= {f"{name}_ms": floor, f"{name}_tokens_per_second": 1e3 * num_tokens / floor.median}
        results.append(result)
    return results


def backends(case: Case, device: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Attention of all layers by each backend that has a kernel for it, in the order that training prefers."""
    config = case.config
    attention = Attention(config, case.batch, args.seq_len, **kind_on(device))
    layers = one_by_one([attention.forward] * config.n_layers + [attention.backward] * config.n_layers)

    def by(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            layers()

    works, missing = {}, {}
    for backend in (backend for backend in SDPA_PRIORITY if backend != SDPBackend.MATH):
        try:
            by(backend)
            works[backend.name] = partial(by, backend)
        except RuntimeError as error:
            if not str(error).startswith(NO_KERNEL):
                raise
            missing[backend.name] = str(error)
    done = operations(config, case.batch * args.seq_len, args.seq_len)["attention"]
    times = turns(works, device, args)
    results = [{"backend": name, "ms": ms, "tflops": done / ms.median / 1e9} for name, ms in times.items()]
    results += [{"backend": name, "missing": why} for name, why in missing.items()]
    return [{"case": case.name} | result for result in results]


def print_results(results: list[dict[str, Any]], of_backends: list[dict[str, Any]]) -> None:
    headings = ["case", "products", "products, ms (TFLOP/s)", "attention", "both", "passes, ms", "optimizer"]
    headings += ["floor, ms", "tokens/s", "in one go, ms", "tokens/s"]
    rows = []
    for r in results:
        cells = [r["case"], "joined" if r["joined"] else "the model's"]
        cells += [f"{r['ms'][name].median:.1f} ({tflops:.4g})" for name, tflops in r["tflops"].items()]
        cells += [f"{r[key]:.1f}" for key in ("passes_ms", "optimizer_ms")]
        for name in ("floor", "in_one_go"):
            cells += [f"{r[f'{name}_ms']:.1f}", f"{r[f'{name}_tokens_per_second']:,.0f}"]
        rows.append(cells)
    print(table(headings, rows))
    rows = []
    for r in of_backends:
        cells = [format(r["ms"], ".2f"), f"{r['tflops']:.4g}"] if "ms" in r else ["no kernel", None]
        rows.append([r["case"], r["backend"], *cells])
    print(table(["case", "attention by", "ms", "TFLOP/s"], rows))


def parse(name: str) -> Case:
    """From a word of the command line; raises ValueError with what is wrong."""
    model, _, sequences = name.partition(":")
    dense = [known for known in MODELS if not Case.parse(f"{known}:compile:none:1").config.moe]
    if model not in dense or not sequences.isdecimal() or int(sequences) == 0:
        raise ValueError(f"{name}: a case is model:sequences, with a model of {', '.join(dense)}")
    return replace(Case.parse(f"{model}:compile:none:{sequences}"), name=name)


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("words", nargs="+", metavar="case")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--in-a-row", type=int, default=3, help="steps between two events")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results there")
    return with_cases(parser, parse)


def main() -> None:
    args, device = arguments(), pick_device()
    found = ceilings(device)
    results, of_backends = [], []
    for case in args.cases:
        results += measure(case, found["copy_tb_per_s"], device, args)
        of_backends += backends(case, device, args)
        print(f"{case.name}: done", flush=True)
        write_report(args.json, device, ceilings=found, cases=results, attention=of_backends)
    print_results(results, of_backends)


if __name__ == "__main__":
    main()
