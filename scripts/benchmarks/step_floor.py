"""What a dense training step cannot be faster than on this GPU, in bf16 with its libraries.

    python scripts/benchmarks/step_floor.py l1b:10 l8x8:4
    python scripts/benchmarks/step_floor.py debug:1 --seq-len 16   # a rehearsal on a CPU, in fp32

A case is a dense model of training.py and the sequences of a step. Nothing is trained: on random tensors
run, in a step's order, all its matrix products (`products`: forward of all layers, the head's three in
chunks by training's own code, backward of all layers), attention forward and backward by the kernel that
training takes (`attention`), and the two together (`both`). To them is added, by arithmetic at the copy speed
that is measured in the same call, what the rest must move at least, if all that lies between two products,
or a product and attention, were one pass that reads what it needs once, and writes what is needed later once.
Numbers of two bytes, a token and layer of width D, feed-forward H, queries Q, keys and values K each:

- 8D forward: twice a residual and a branch's output are read, their sum and its norm written
- 8D backward: twice the norm's gradient, its input and the residual's gradient are read, a sum written
- 3D backward: of q, k, v and of gate, up each has its own gradient of the input; three more are read, by
  the norm's pass or by products that add to them. None where weights are joined
- 4 (Q + K): rotation reads and writes queries and keys, forward and backward
- 3H forward: SwiGLU reads gate and up, writes h; 5H backward: reads h's gradient, gate and up, writes two
  gradients. h is kept (compiled code writes it again: H more)

Then logits, read once, and their gradient written, 4 bytes each; and 30 bytes a weight: AdamW reads and
writes fp32 weights and two moments, reads bf16 gradients, which their norm for clipping has read before, and
writes bf16 copies. Left out: the embedding with the first norm forward and the last backward, tables,
statistics, the rounding of the head's gradients, and all waiting.

`floor` is the sum. In training a GPU that rests from products during passes may multiply faster than
in products alone, so `in one go` measures a step with copies of as many bytes in it: after each layer, after
the head and at the end. Both presume that passes do not run beside products, and both stand a second time
with q, k, v as one product and gate, up as another. TFLOP/s count attention's causal half, backward as twice
forward. A second table has attention by each backend alone; training takes the first that can run.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import Spread, Work, ceilings, pick_device, table, take_turns, write_report

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtitan.models.attention import SDPA_PRIORITY, attend
from torchtitan.models.decoder import DecoderConfig
from torchtitan.models.flops import flops_per_token
from torchtitan.ops.cross_entropy import EXACT, both_sides, chunked_linear_cross_entropy
from training import MODELS, Case

PARTS = {
    "products": {"products"},
    "attention": {"attention"},
    "both": {"products", "attention"},
    "in one go": {"products", "attention", "passes"},
}
LARGEST_COPY = 2**27
"""Numbers of four bytes."""
NO_KERNEL = ("No available kernel", "No viable backend")
"""How the errors of torch 2.11 and 2.13 begin where a backend cannot run."""


def widths(config: DecoderConfig) -> tuple[int, int]:
    """Channels of a layer's queries, and of its keys or values."""
    return config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim


def linear_sizes(config: DecoderConfig, joined: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(inputs, outputs) of a layer's products, those before attention and those behind it."""
    (q, k), dim, ffn = widths(config), config.dim, config.ffn_dim
    if joined:
        return [(dim, q + 2 * k)], [(q, dim), (dim, 2 * ffn), (ffn, dim)]
    return [(dim, q), (dim, k), (dim, k)], [(q, dim), (dim, ffn), (dim, ffn), (ffn, dim)]


def operations(config: DecoderConfig, num_tokens: int, seq_len: int) -> dict[str, float]:
    """FLOPs of a step, by part: those that training reports."""
    weights = sum(i * o for sizes in linear_sizes(config, joined=False) for i, o in sizes)
    products = 6.0 * num_tokens * (config.n_layers * weights + config.dim * config.vocab_size)
    both = num_tokens * flops_per_token(config, seq_len)[1]
    return {"products": products, "attention": both - products, "both": both}


def fewest_bytes(config: DecoderConfig, num_tokens: int, joined: bool) -> dict[str, int]:
    """That passes must move, as this file's head counts them; forward and backward of one layer."""
    (q, k), dim, ffn = widths(config), config.dim, config.ffn_dim
    partial_gradients = 0 if joined else 3 * dim
    with torch.device("meta"):
        num_weights = sum(weight.numel() for weight in config.build().parameters())
    return {
        "forward": 2 * num_tokens * (8 * dim + 2 * (q + k) + 3 * ffn),
        "backward": 2 * num_tokens * (8 * dim + partial_gradients + 2 * (q + k) + 5 * ffn),
        "loss": 4 * num_tokens * config.vocab_size,
        "optimizer": 30 * num_weights,
    }


class Linear:
    """The products of a Linear layer: x (T, I), weight (O, I), grad (T, O), all random."""

    part = "products"

    def __init__(self, num_tokens: int, num_inputs: int, num_outputs: int, **kind: Any):
        sizes = (num_tokens, num_inputs), (num_outputs, num_inputs), (num_tokens, num_outputs)
        self.x, self.weight, self.grad = (torch.randn(size, **kind) for size in sizes)

    def forward(self) -> None:
        self.x @ self.weight.t()

    def backward(self) -> None:
        self.grad @ self.weight
        self.grad.t() @ self.x


class Attention:
    """Causal attention of random q (B, L, H, C), k and v (B, L, G, C): backward of forwards before it."""

    part = "attention"

    def __init__(self, config: DecoderConfig, num_sequences: int, seq_len: int, **kind: Any):
        heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads, config.n_heads)
        sizes = [(num_sequences, seq_len, number, config.head_dim) for number in heads]
        *inputs, self.grad = (torch.randn(size, **kind) for size in sizes)
        self.inputs = [x.requires_grad_() for x in inputs]
        self.outs: list[torch.Tensor] = []

    def forward(self) -> None:
        self.outs.append(attend(*self.inputs, None))

    def backward(self) -> None:
        torch.autograd.grad(self.outs.pop(), self.inputs, self.grad)


class Passes:
    """In their place, copies that read half of so many bytes and write the other half."""

    part = "passes"

    def __init__(self, num_bytes: dict[str, int], device: str):
        length = min(LARGEST_COPY, max(num_bytes.values()) // 8)
        self.source, self.target = torch.randn(2, length, device=device)
        self.forward, self.backward, self.loss, self.optimizer = (
            partial(self.copy, num_bytes[name] // 8) for name in ("forward", "backward", "loss", "optimizer")
        )

    def copy(self, size: int) -> None:
        for start in range(0, size, len(self.source)):
            piece = min(len(self.source), size - start)
            self.target[:piece].copy_(self.source[:piece])


def head(config: DecoderConfig, num_tokens: int, **kind: Any) -> Work:
    """Its products, as training chunks them, without the loss's passes over logits."""
    products = replace(EXACT, loss=lambda logits, labels, needed: (labels, both_sides(logits, needed)))
    hidden, weight = (
        torch.randn(rows, config.dim, **kind, requires_grad=True) for rows in (num_tokens, config.vocab_size)
    )
    labels = torch.zeros(num_tokens, device=hidden.device)
    return lambda: chunked_linear_cross_entropy(hidden, weight, labels, products)


def steps(
    config: DecoderConfig, attention: Attention, head: Work, passes: Passes, linears: Sequence[list[Linear]]
) -> dict[str, Work]:
    """Of `PARTS`, each in the step's order. One layer's tensors serve all layers."""
    before, after = linears
    layer = [*before, attention, *after, passes]
    forward = [(of.part, of.forward) for of in layer] * config.n_layers
    backward = [(of.part, of.backward) for of in reversed(layer)] * config.n_layers
    ends = [("products", head), ("passes", passes.loss)]
    step = [*forward, *ends, *backward, ("passes", passes.optimizer)]
    return {
        name: one_by_one([work for part, work in step if part in parts]) for name, parts in PARTS.items()
    }


def one_by_one(works: Sequence[Work]) -> Work:
    def run():
        for work in works:
            work()

    return run


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
        floors = {"floor": ms["both"].median + passes + optimizer, "in_one_go": ms["in one go"].median}
        for name, floor in floors.items():
            result |= {f"{name}_ms": floor, f"{name}_tokens_per_second": 1e3 * num_tokens / floor}
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
        cells += [f"{r[key]:.1f}" for key in ("passes_ms", "optimizer_ms", "floor_ms")]
        cells += [f"{r['floor_tokens_per_second']:,.0f}", f"{r['ms']['in one go']:.1f}"]
        rows.append([*cells, f"{r['in_one_go_tokens_per_second']:,.0f}"])
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
    args = parser.parse_args()
    try:
        args.cases = [parse(name) for name in args.words]
    except ValueError as error:
        parser.error(str(error))
    return args


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
