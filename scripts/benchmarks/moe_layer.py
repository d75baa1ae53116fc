"""One MoE layer, forward and backward, beside other versions of it: time, memory, TFLOP/s.

    python scripts/benchmarks/moe_layer.py                              # on a GPU: both shapes
    python scripts/benchmarks/moe_layer.py --layers ours "ours compiled" products --kernels ours
    python scripts/benchmarks/moe_layer.py --recipes float8_rowwise float8_rowwise_with_gw_hp
    python scripts/benchmarks/moe_layer.py --shapes small --tokens 512  # a rehearsal on a CPU

T tokens, D model, F expert width, E experts, K top-k; bf16. TFLOP/s counts the experts' products
forward and backward, 18 * T * K * D * F operations, in a row: eight steps between two events, where a
step's launches hide behind the step before, as in training; alone, one; rested, one whose launches are
hidden, after a pause: a GPU that multiplies in a row lowers its clock to keep its power. "products" is
these grouped GEMMs alone, with the loads that the layer's router gives, "dense" the same work as dense
products: ceilings of this machine, measured in the same run. "floor" is products and the bytes that no
layer can spare beside them, at the speed of a copy. "unfused" gathers and gates between products, also
where a GPU has kernels that do so inside. "plain" has separate gate and up products and a scatter-add
combine, "transformers" is that library's Qwen3-MoE block with its grouped_mm experts, of any shape's
sizes, and "liger" the fused Triton experts of liger-kernel (a pure wheel; 0.8.5 is what was read). All
have the same weights. Other libraries' kernels do not install beside torch 2.11: sonic-moe 0.1.2 asks
for torch below 2.9.2, scattermoe is not on PyPI. Variants take turns; --layers picks some by name. With
--recipes there are also layers whose experts multiply in few bits (on a CPU emulated, to rehearse), and
each recipe's "products", of numbers that are float8 already (with gw_hp four of the six). --kernels
adds, after the table, what a variant's time is made of by the profiler.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import (
    Spread,
    ceilings,
    grouped_products,
    milliseconds,
    peak_gib,
    pick_device,
    record,
    table,
    take_turns,
    write_report,
)

import torch
from torch import nn

from breakdown import read_events, spans_of, sums_by_name, sums_table
from moe_peers import LigerMoE, Missing, PlainMoE, transformers_moe
from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.moe import MoE
from torchtitan.ops import quantized_kernels
from torchtitan.routing import count_tokens

SHAPES = {
    "q30b": {"dim": 2048, "ffn_dim": 768, "num_experts": 128, "top_k": 8},  # qwen3 30B-A3B
    "ds16b": {"dim": 2048, "ffn_dim": 1408, "num_experts": 64, "top_k": 6},  # deepseek_v3 16B
    "mixtral": {"dim": 4096, "ffn_dim": 14336, "num_experts": 8, "top_k": 2},  # mixtral 8x7B
    "small": {"dim": 64, "ffn_dim": 32, "num_experts": 8, "top_k": 2},
}
COMPILED = " compiled"
LAYERS = (
    "ours", "ours unfused", "plain", "transformers", "liger", "ours compiled", "plain compiled",
    "transformers compiled", "products", "dense",
)  # fmt: skip
IN_A_ROW, RECORDED, MOST_KERNELS = 8, 5, 30
PAUSE, IDLE_CYCLES, RESTED_STEPS = 0.1, 30_000_000, 11
"""Seconds before each of so many steps of a GPU that is rested, and cycles in which their launches are made."""


def float8_products_alone(
    moe: MoE, counts: torch.Tensor, recipe: quantized_kernels.Recipe
) -> Callable[[], object]:
    """The grouped products of float8 numbers, as many of them as the recipe has.

    counts (E,) int64: each expert's rows, of which these products take whole blocks.
    """
    from torchtitan.ops import float8_triton

    w13, w2 = moe.experts.w13.detach().flatten(1, 2), moe.experts.w2.detach()
    counts = -(-counts // recipe.alignment) * recipe.alignment
    tensors = [
        torch.randn(int(counts.sum()), width, device=w2.device, dtype=w2.dtype)
        for width in (w2.shape[1], w13.shape[1], w2.shape[2])
    ]
    rows, z, act = (float8_triton.quantize_rows(x) for x in tensors)
    factors = [float8_triton.quantize_matrices(x) for x in (w13.mT, w2.mT, w2, w13)]
    columns = [float8_triton.quantize_group_columns(x, counts) for x in tensors]

    def run():
        for a, b in zip((rows, act, rows, z), factors, strict=True):
            quantized_kernels.float8_product(a.data, a.scale.squeeze(1), b.data, b.scale, counts)
        if recipe.weights:
            for a, b in ((columns[0], columns[2]), (columns[1], columns[0])):
                scales = a.scale.flatten(), b.scale.flatten()
                quantized_kernels.float8_product(a.data.t(), scales[0], b.data, scales[1], counts)

    return run


def dense_product(moe: MoE, num_rows: int) -> Callable[[], object]:
    """The same work: nine products of (T * K, D) and (D, F)."""
    w2 = moe.experts.w2.detach()
    rows = torch.randn(num_rows, w2.shape[1], device=w2.device, dtype=w2.dtype)
    return lambda: [rows @ w2[0] for _ in range(9)]


def build(shape: dict[str, int], routing: str, args: argparse.Namespace) -> tuple[MoE, MoEConfig]:
    shape = dict(shape)
    dim = shape.pop("dim")
    config = MoEConfig(
        **shape,
        route_norm=True,
        force_load_balance=routing == "balanced",
        max_rows_per_chunk=args.max_rows_per_chunk,
    )
    moe = MoE(dim, config, residual_std=0.02).to(args.device, torch.bfloat16)
    moe.fill_buffers(torch.device(args.device))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0.0, 0.02)
    return moe, config


def step_of(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> Callable[[], object]:
    leaves = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), leaves, upstream)


def rested(work: Callable[[], object], device: str) -> Spread | None:
    """Milliseconds of one step, without its launches, on a GPU that did nothing before; None on a CPU."""
    if device == "cpu":
        return None
    times = []
    for _ in range(RESTED_STEPS):
        time.sleep(PAUSE)
        torch.cuda._sleep(IDLE_CYCLES)  # no public name; torch 2.11 and 2.13
        times.append(milliseconds(work, device))
    return Spread.of(times)


def bytes_beside_products(config: MoEConfig, dim: int, num_tokens: int) -> int:
    """What a layer moves at least, forward and backward, in bf16, beside what its grouped products do.

    A row of T * K: each token's sum reads D, both ways. Gating writes the activation, F, forward, and again
    backward, where it reads z, 2F, and writes its gradient, 2F, in place of the product's F: 5F in all. A
    token: D of either sum written, and read twice by the router's products.
    """
    num_rows = num_tokens * config.top_k
    return 2 * (num_rows * (2 * dim + 5 * config.ffn_dim) + num_tokens * 4 * dim)


def saved_mib(layer: nn.Module, x: torch.Tensor) -> float:
    """Memory that one forward keeps for backward, besides weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)  # alive until storages are counted
    assert out.requires_grad
    return sum(kept.values()) / 2**20


def build_layers(
    moe: MoE, config: MoEConfig, args: argparse.Namespace
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that were asked for, by name; and of those that cannot run here, why."""
    makers = {
        "ours": lambda: moe,
        "ours unfused": lambda: with_backend(moe, "unfused"),
        "plain": lambda: PlainMoE(moe, config),
        "transformers": lambda: transformers_moe(moe, config),
        "liger": lambda: LigerMoE(moe, config),
    }
    layers, missing = {}, {}
    for name in LAYERS:
        made = name.removesuffix(COMPILED)
        if name not in args.layers or made not in makers or made in missing:
            continue
        try:
            layer = layers[made] if made in layers else makers[made]()
            layers[name] = layer if made == name else torch.compile(layer)
        except Missing as error:
            missing[name] = str(error)
    emulated = quantized_kernels.EMULATED if args.device == "cpu" else ""
    for recipe in args.recipes:
        layers[recipe] = copy.deepcopy(moe)
        layers[recipe].quantize_experts(f"{emulated}{recipe}")
        if not args.no_compile:
            layers[recipe + COMPILED] = torch.compile(layers[recipe])
    return layers, missing


def with_backend(moe: MoE, backend: str) -> MoE:
    moe = copy.deepcopy(moe)
    moe.experts.backend = backend
    return moe


def build_products(
    moe: MoE, counts: torch.Tensor, args: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """Ceilings at this layer's shape and loads, counts (E,) int64, by name."""
    w13, w2 = moe.experts.w13.detach().flatten(1, 2), moe.experts.w2.detach()
    works = {}
    if "products" in args.layers:
        works["products"] = grouped_products(w13, w2, counts)
    if "dense" in args.layers:
        works["dense"] = dense_product(moe, int(counts.sum()))
    for recipe in args.recipes if args.device == "cuda" else ():
        made = quantized_kernels.RECIPES[recipe]
        works[f"{recipe} products"] = float8_products_alone(moe, counts, made)
    return works


@torch.no_grad()
def loads_of(moe: MoE, config: MoEConfig, x: torch.Tensor) -> torch.Tensor:
    """Tokens of each expert by the layer's own router, (E,) int64."""
    chosen = moe.router(x.flatten(0, 1), None).selected_experts_indices
    return count_tokens(chosen, config.num_experts)


def measure(name: str, routing: str, args: argparse.Namespace, copy_tb_per_s: float) -> list[dict]:
    shape = {key: getattr(args, key) or value for key, value in SHAPES[name].items()}
    moe, config = build(shape, routing, args)
    generator = torch.Generator(device=args.device).manual_seed(0)
    x, upstream = torch.randn(
        2, 1, args.tokens, shape["dim"], device=args.device, generator=generator
    ).bfloat16()
    x = x.clone().requires_grad_()
    counts = loads_of(moe, config, x)
    layers, missing = build_layers(moe, config, args)
    works = {variant: step_of(layer, x, upstream) for variant, layer in layers.items()}
    works |= build_products(moe, counts, args)
    options = {"rounds": args.rounds, "repeats": args.repeats}
    times = take_turns(works, args.device, warm_up=args.warm_up, **options)
    times_in_a_row = take_turns(works, args.device, warm_up=0, in_a_row=IN_A_ROW, **options)
    with torch.no_grad():
        expected = PlainMoE(moe, config)(x).double()
    operations = 18 * args.tokens * config.top_k * shape["dim"] * config.ffn_dim
    about = {"shape": name, "routing": routing, "tokens": args.tokens}
    about["busiest_expert"] = (counts.max() / counts.double().mean()).item()
    results = []
    for variant, work in works.items():
        layer = layers.get(variant)
        alone, ms = Spread.of(times[variant]), Spread.of(times_in_a_row[variant])
        result = about | {"variant": variant, "ms": ms, "ms_alone": alone}
        result["tflops"] = operations / ms.median / 1e9
        if layer is not None:
            error = (layer(x).detach().double() - expected).norm() / expected.norm()
            result |= {"peak_gib": peak_gib(work, args.device), "saved_mib": saved_mib(layer, x)}
            result["difference"] = error.item()
        if variant in args.rested:
            result["ms_rested"] = rested(work, args.device)
        if variant in args.kernels:
            result["kernels"] = kernels_of(work, args.device)
        results.append(result)
        if variant == "products":
            passes = bytes_beside_products(config, shape["dim"], args.tokens) / copy_tb_per_s / 1e9
            floor = about | {"variant": "floor", "ms": ms.plus(passes)}
            results.append(floor | {"tflops": operations / floor["ms"].median / 1e9})
    return results + [about | {"variant": variant, "missing": why} for variant, why in missing.items()]


def kernels_of(work: Callable[[], object], device: str) -> list[dict]:
    """What one call's time is made of by the profiler, the longest first; on a CPU its operators."""
    for _ in range(2):
        work()  # the first may compile, or find the quickest kernel
    with tempfile.TemporaryDirectory(prefix="torchtitan_benchmark_") as folder:
        file = Path(folder, "trace.json.gz")
        record(lambda: [work() for _ in range(RECORDED)], device, file)
        return sums_by_name(spans_of(read_events(file)), RECORDED)


def print_results(results: list[dict]) -> None:
    rows = []
    for r in results:
        loads = f"{r['routing']}, {r['busiest_expert']:.2f}"
        cells = [r["shape"], loads, r["variant"]]
        if "missing" in r:
            rows.append([*cells, r["missing"], *[None] * 6])
            continue
        cells += [format(r["ms"], ".2f"), f"{r['tflops']:.4g}"]
        for key in ("ms_alone", "ms_rested"):
            cells.append(format(r[key].median, ".2f") if r.get(key) is not None else None)
        for key, form in {"peak_gib": ".2f", "saved_mib": ".1f", "difference": ".1e"}.items():
            cells.append(format(r[key], form) if r.get(key) is not None else None)
        rows.append(cells)
    headings = ("shape", "routing, busiest expert", "layer", "ms", "TFLOP/s", "ms alone", "rested")
    print(table([*headings, "peak GiB", "saved MiB", "vs plain"], rows))
    print("The busiest expert's tokens are over the mean of all; products have the same loads.")
    for r in results:
        if "kernels" in r:
            total = sum(kernel["ms"] for kernel in r["kernels"])
            print(f"\n{r['variant']}, {r['shape']}, {r['routing']}: {total:.2f} ms by the profiler")
            print(sums_table(r["kernels"][:MOST_KERNELS]))


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default=pick_device())
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["q30b", "ds16b"])
    parser.add_argument("--routing", nargs="+", default=["natural", "balanced"])
    parser.add_argument("--tokens", type=int, default=32768)
    for key in SHAPES["small"]:
        parser.add_argument(f"--{key}", type=int, help="in place of the shape's")
    parser.add_argument("--max_rows_per_chunk", type=int, default=0)
    float8 = [name for name in quantized_kernels.RECIPES if name.startswith("float8")]
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS, help="all, if not said")
    parser.add_argument("--recipes", nargs="*", choices=float8, default=[])
    parser.add_argument("--no_compile", action="store_true", help="leave out what is compiled")
    parser.add_argument("--kernels", nargs="+", default=[], metavar="LAYER", help="sums by the profiler")
    parser.add_argument("--rested", nargs="+", default=[], metavar="LAYER", help="after pauses, too")
    parser.add_argument("--warm_up", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    if args.no_compile:
        args.layers = [name for name in args.layers if not name.endswith(COMPILED)]
    measured = {*args.layers, *(name for name in args.kernels if name.startswith(tuple(args.recipes)))}
    if unknown := {*args.kernels, *args.rested} - measured:
        parser.error(f"--kernels, --rested: not measured: {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = arguments()
    found = ceilings(args.device)
    print(f"{args.tokens} tokens, bfloat16", flush=True)
    results = []
    for shape in args.shapes:
        for routing in args.routing:
            results += measure(shape, routing, args, found["copy_tb_per_s"])
            torch.compiler.reset()
    print_results(results)
    write_report(args.json, args.device, ceilings=found, results=results)


if __name__ == "__main__":
    main()
