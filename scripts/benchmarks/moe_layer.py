"""One MoE layer, forward and backward, beside a plain version of it: time, memory, TFLOP/s.

    python scripts/benchmarks/moe_layer.py                              # on a GPU: both shapes
    python scripts/benchmarks/moe_layer.py --recipes float8_rowwise float8_rowwise_with_gw_hp
    python scripts/benchmarks/moe_layer.py --shapes small --tokens 512  # a rehearsal on a CPU

T tokens, D model, F expert width, E experts, K top-k; bf16. TFLOP/s counts the experts' products
forward and backward, 18 * T * K * D * F operations, in a row: eight steps between two events, where a
step's launches hide behind the step before, as in training; alone, one. "products" is these grouped GEMMs
alone, "dense" the same work as dense products: ceilings of this machine, measured in the same run.
"unfused" gathers and gates between products, also where a GPU has kernels that do so inside. The plain
version has separate gate and up products and a scatter-add combine. Variants take turns. With
--recipes there are also layers whose experts multiply in few bits (on a CPU emulated, to rehearse), and
each recipe's "products", of numbers that are float8 already (with gw_hp four of the six).
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

from common import (
    Spread,
    ceilings,
    grouped_products,
    peak_gib,
    pick_device,
    table,
    take_turns,
    write_report,
)

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.models.moe.config import MoEConfig
from torchtitan.models.moe.moe import MoE
from torchtitan.ops import quantized_kernels

SHAPES = {
    "q30b": {"dim": 2048, "ffn_dim": 768, "num_experts": 128, "top_k": 8},  # qwen3 30B-A3B
    "ds16b": {"dim": 2048, "ffn_dim": 1408, "num_experts": 64, "top_k": 6},  # deepseek_v3 16B
    "small": {"dim": 64, "ffn_dim": 32, "num_experts": 8, "top_k": 2},
}


IN_A_ROW = 8


class PlainMoE(nn.Module):
    """What one would write first: the same arithmetic, left to autograd."""

    def __init__(self, moe: MoE, config: MoEConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Parameter(moe.router.gate.weight.detach().clone())
        w1, w3 = moe.experts.w13.detach().unbind(1)
        self.w1, self.w3 = nn.Parameter(w1.clone()), nn.Parameter(w3.clone())
        self.w2 = nn.Parameter(moe.experts.w2.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        config, tokens = self.config, x.flatten(0, 1)
        scores = (tokens @ self.gate.t()).softmax(-1, dtype=torch.float32)
        if config.force_load_balance:
            turns = torch.arange(len(tokens) * config.top_k, device=x.device) % config.num_experts
            ids = turns.view(-1, config.top_k)
        else:
            ids = scores.topk(config.top_k).indices
        top_scores = scores.gather(1, ids)
        top_scores = top_scores / top_scores.sum(-1, keepdim=True)
        order = ids.flatten().argsort(stable=True)
        index = order // config.top_k
        ends = F.one_hot(ids.flatten(), config.num_experts).sum(0).cumsum(0).int()
        rows = tokens[index]
        gate = F.grouped_mm(rows, self.w1.mT, offs=ends)
        up = F.grouped_mm(rows, self.w3.mT, offs=ends)
        y = F.grouped_mm(F.silu(gate) * up, self.w2.mT, offs=ends)
        y = (y * top_scores.flatten()[order].unsqueeze(1)).to(x.dtype)
        index = index.unsqueeze(1).expand_as(y)
        return torch.zeros_like(tokens).scatter_add(0, index, y).view_as(x)


def float8_products_alone(
    moe: MoE, config: MoEConfig, num_rows: int, recipe: quantized_kernels.Recipe
) -> Callable[[], object]:
    """The grouped products of float8 numbers, as many of them as the recipe has; groups are aligned."""
    from torchtitan.ops import float8_triton

    w13, w2 = moe.experts.w13.detach().flatten(1, 2), moe.experts.w2.detach()
    blocks = torch.linspace(0, num_rows // recipe.alignment, config.num_experts + 1, device=w2.device)
    counts = blocks.long().diff() * recipe.alignment
    tensors = [
        torch.randn(num_rows, width, device=w2.device, dtype=w2.dtype)
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


def dense_product(moe: MoE, config: MoEConfig, num_rows: int) -> Callable[[], object]:
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


def in_a_row(work: Callable[[], object]) -> Callable[[], None]:
    def several() -> None:
        for _ in range(IN_A_ROW):
            work()

    return several


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


def measure(name: str, routing: str, args: argparse.Namespace) -> list[dict]:
    shape = {key: getattr(args, key) or value for key, value in SHAPES[name].items()}
    moe, config = build(shape, routing, args)
    generator = torch.Generator(device=args.device).manual_seed(0)
    x, upstream = torch.randn(
        2, 1, args.tokens, shape["dim"], device=args.device, generator=generator
    ).bfloat16()
    x = x.clone().requires_grad_()
    plain = PlainMoE(moe, config)
    unfused = copy.deepcopy(moe)
    unfused.experts.backend = "unfused"
    layers = {"ours": moe, "ours unfused": unfused, "plain": plain}
    if not args.no_compile:
        layers |= {"ours compiled": torch.compile(moe), "plain compiled": torch.compile(plain)}
    for recipe in args.recipes:
        emulated = quantized_kernels.EMULATED if args.device == "cpu" else ""
        layers[recipe] = copy.deepcopy(moe)
        layers[recipe].quantize_experts(f"{emulated}{recipe}")
        if not args.no_compile:
            layers[f"{recipe} compiled"] = torch.compile(layers[recipe])
    num_rows = args.tokens * config.top_k
    works = {variant: step_of(layer, x, upstream) for variant, layer in layers.items()}
    experts = moe.experts
    works["products"] = grouped_products(experts.w13.detach().flatten(1, 2), experts.w2.detach(), num_rows)
    works["dense"] = dense_product(moe, config, num_rows)
    for recipe in args.recipes if args.device == "cuda" else ():
        made = quantized_kernels.RECIPES[recipe]
        works[f"{recipe} products"] = float8_products_alone(moe, config, num_rows, made)
    options = {"rounds": args.rounds, "repeats": args.repeats}
    times = take_turns(works, args.device, warm_up=args.warm_up, **options)
    several = {variant: in_a_row(work) for variant, work in works.items()}
    times_in_a_row = take_turns(several, args.device, warm_up=0, **options)
    expected = plain(x).detach().double()
    operations = 18 * num_rows * shape["dim"] * config.ffn_dim
    results = []
    for variant, work in works.items():
        layer = layers.get(variant)
        alone, ms = Spread.of(times[variant]), Spread.of(times_in_a_row[variant]).scaled(1 / IN_A_ROW)
        result = {"shape": name, "routing": routing, "variant": variant, "tokens": args.tokens}
        result |= {"ms": ms, "ms_alone": alone, "tflops": operations / ms.median / 1e9}
        if layer is not None:
            error = (layer(x).detach().double() - expected).norm() / expected.norm()
            result |= {"peak_gib": peak_gib(work, args.device), "saved_mib": saved_mib(layer, x)}
            result["difference"] = error.item()
        results.append(result)
    return results


def print_results(results: list[dict]) -> None:
    rows = []
    for r in results:
        cells = [r["shape"], r["routing"], r["variant"]]
        cells += [format(r["ms"], ".2f"), f"{r['tflops']:.4g}", format(r["ms_alone"].median, ".2f")]
        for key, form in {"peak_gib": ".2f", "saved_mib": ".1f", "difference": ".1e"}.items():
            cells.append(format(r[key], form) if r.get(key) is not None else None)
        rows.append(cells)
    headings = ("shape", "routing", "layer", "ms", "TFLOP/s", "ms alone", "peak GiB", "saved MiB", "vs plain")
    print(table(headings, rows))


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
    parser.add_argument("--recipes", nargs="*", choices=float8, default=[])
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--warm_up", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the results there")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    found = ceilings(args.device)
    print(f"{args.tokens} tokens, bfloat16", flush=True)
    results = []
    for shape in args.shapes:
        for routing in args.routing:
            results += measure(shape, routing, args)
            torch.compiler.reset()
    print_results(results)
    write_report(args.json, args.device, ceilings=found, results=results)


if __name__ == "__main__":
    main()
