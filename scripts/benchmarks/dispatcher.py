"""Bringing tokens to experts and back, forward and backward: each dispatcher's time, side by side.

    python -m torch.distributed.run --nproc-per-node 2 scripts/benchmarks/dispatcher.py
    python scripts/benchmarks/dispatcher.py                   # one GPU: the local dispatcher
    python scripts/benchmarks/dispatcher.py --small           # a rehearsal on a CPU

"exchange" is dispatch and combine alone, "layer" is with the experts between; "layer with shared" has
shared experts too, which compute while rows are on their way, but for "standard, in one go", which
waits for rows first. T tokens of each rank, K experts a token, D model width, F expert width, E experts:
qwen3 30B-A3B's, in bf16; --shared_experts as wide as so many experts. "random" routing draws
experts, "skewed" draws some twice as often as others. With --float8 there are also experts that
multiply in float8, in recipe rowwise (on a CPU emulated), whose rows travel as bf16 and as float8. A
measurement is of some layers in a row, as in a model: the host runs ahead of the GPU where nothing makes
it wait. Dispatchers take turns; of each the slowest rank's median is shown, and its 10th and 90th
percentile.

GB/s counts what really leaves a rank, the mean of all ranks, of routed rows alone (counts, choices
and whatever stays on its rank are not in it). Four times a layer: rows to experts, their results back,
and the gradients of both. By all-to-all each choice of another rank's expert is a row, D numbers of 2 bytes,
or of 1 with 16 bytes for scale and score; rows to experts and the gradients of these have their
score's 16 bytes. Through symmetric memory a token goes to a rank once, for however many of its experts,
but every choice's row comes back; a score has 4 bytes.

Ceilings of the same call: an all-to-all of T * K rows of D bf16 numbers there and back, as many to each
rank, its GB/s as above; a copy of these rows, read and write counted; and a large product and copy.
"""

import argparse
import copy
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

from common import Spread, ceilings, device_name, peak_gib, record, table, take_turns, write_report

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from torchtitan.distributed.comm import destroy_process_group
from torchtitan.distributed.expert_parallel.all_to_all import AllToAllTokenDispatcher
from torchtitan.distributed.expert_parallel.peer_exchange import PeerExchange, Sizes
from torchtitan.distributed.expert_parallel.peer_memory import SymmetricMemory
from torchtitan.distributed.expert_parallel.symmetric_memory import SymmetricMemoryTokenDispatcher
from torchtitan.distributed.expert_parallel.torchao import TorchAOTokenDispatcher
from torchtitan.models.feed_forward import FeedForward
from torchtitan.models.moe.dispatch import LocalTokenDispatcher, TokenDispatcher
from torchtitan.models.moe.experts import GroupedExperts
from torchtitan.ops.quantized_kernels import EMULATED, row_alignment
from torchtitan.routing import WholeDispatch

SMALL = {"tokens": 64, "top_k": 2, "dim": 64, "num_experts": 8, "ffn_dim": 32, "layers": 2}
FLOAT8 = {"float8 experts": False, "float8 experts and exchange": True}
"""Whether rows travel so."""
MESSAGE_SCORE, SYMMETRIC_SCORE = 16, 4
"""Bytes that a row's score takes beside it, in an all-to-all message and through symmetric memory."""


class InOneGo(WholeDispatch):
    """Another dispatcher, of which nothing is on its way while the caller computes."""

    def __init__(self, dispatcher: TokenDispatcher):
        self.dispatch, self.combine = dispatcher.dispatch, dispatcher.combine


@dataclass(frozen=True)
class Variant:
    """A dispatcher, and what multiplies behind it."""

    dispatcher: TokenDispatcher
    backend: str = "auto"


def build(args: argparse.Namespace, device: torch.device) -> dict[str, Variant]:
    world = dist.get_world_size()
    if world == 1:
        return {"local": Variant(LocalTokenDispatcher(args.num_experts, score_before_experts=False))}
    mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("ep",))
    standard = AllToAllTokenDispatcher(mesh, args.num_experts, False)
    variants = {"standard": Variant(standard), "standard, in one go": Variant(InOneGo(standard))}
    backend = f"{EMULATED if device.type == 'cpu' else ''}float8_rowwise"
    for name, in_float8 in FLOAT8.items() if args.float8 else ():
        options = {"row_alignment": row_alignment(backend), "exchange_in_float8": in_float8}
        dispatcher = TorchAOTokenDispatcher(mesh, args.num_experts, False, **options)
        variants[name] = Variant(dispatcher, backend)
    open_memory = partial(SymmetricMemory, mesh.get_group())
    for factor in args.capacity_factors if device.type == "cuda" else ():
        sizes = Sizes(world, args.tokens, args.top_k, args.dim, args.num_experts, factor)
        exchange = PeerExchange(sizes, torch.bfloat16, open_memory)
        ours = SymmetricMemoryTokenDispatcher(exchange, args.num_experts, False)
        variants[f"symmetric_memory, {factor:g}"] = Variant(ours)
    return variants


def bytes_that_leave(dispatcher: TokenDispatcher, ids: torch.Tensor, args: argparse.Namespace) -> float:
    """Of routed rows, in one layer, forward and backward: a mean over ranks.

    ids (T, K) are the experts that this rank's tokens go to.
    """
    world = dist.get_world_size()
    reached = F.one_hot(ids // (args.num_experts // world), world).sum(1)  # (T, ranks)
    reached[:, dist.get_rank()] = 0
    sent = torch.stack([reached.sum(), (reached > 0).sum()]).double()
    dist.all_reduce(sent)
    rows, tokens = (sent / world).tolist()  # what leaves one rank enters another: means of both are equal
    row = 2 * args.dim
    if isinstance(dispatcher, SymmetricMemoryTokenDispatcher):
        return 2 * tokens * row + 2 * rows * row + 2 * rows * SYMMETRIC_SCORE
    if getattr(dispatcher, "exchange_in_float8", False):
        return rows * (2 * (args.dim + MESSAGE_SCORE) + 2 * row + MESSAGE_SCORE)
    return rows * (4 * row + 2 * MESSAGE_SCORE)


def exchange_ceilings(args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """GB/s of a plain all-to-all of as many rows as are routed, and of a copy of them; slowest rank's."""
    world = dist.get_world_size()
    num_rows = args.tokens * args.top_k // world * world
    source = torch.randn(num_rows, args.dim, device=device).bfloat16()
    target = torch.empty_like(source)

    def there_and_back() -> None:
        dist.all_to_all_single(target, source)
        dist.all_to_all_single(source, target)

    works = {"copy": lambda: target.copy_(source)}
    works |= {"all_to_all": there_and_back} if world > 1 else {}
    options = {"warm_up": args.warm_up, "rounds": args.rounds, "repeats": args.repeats}
    times = take_turns(works, device.type, **options)
    moved = {"copy": 2 * source.nbytes, "all_to_all": 2 * source.nbytes * (world - 1) / world}
    found: dict[str, object] = {"rows": num_rows}
    for name, measured in times.items():
        ms = Spread(*slowest(astuple(Spread.of(measured))))
        found[name] = {"ms": ms, "gb_per_s": moved[name] / ms.median / 1e6}
    return found


def slowest(mine: tuple[float, ...]) -> tuple[float, ...]:
    """Of all ranks' figures those of the rank whose first is largest."""
    of_ranks: list[tuple[float, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return max(of_ranks)


def draw(routing: str, args: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    options = {"device": device, "generator": generator}
    x = torch.randn(args.tokens, args.dim, **options).bfloat16()
    weights = torch.ones(args.tokens, args.num_experts, device=device)
    if routing == "skewed":
        weights[:, : args.num_experts // 4] = 2
    ids = torch.multinomial(weights, args.top_k, generator=generator)
    scores = torch.rand(args.tokens, args.top_k, **options)
    upstream = torch.randn(args.tokens, args.dim, **options).bfloat16()
    return [x.requires_grad_(), scores.requires_grad_(), ids, upstream]


def layers_in_a_row(
    dispatcher: TokenDispatcher,
    experts: GroupedExperts | None,
    shared: FeedForward | None,
    tensors: list[torch.Tensor],
    num_layers: int,
) -> Callable[[], torch.Tensor]:
    """Forward and backward, each layer by itself; returns the last one's gradient of x."""
    x, scores, ids, upstream = tensors
    leaves = [x, *([scores, *experts.parameters()] if experts else [])]
    leaves += shared.parameters() if shared else []

    def run() -> torch.Tensor:
        for _ in range(num_layers):
            started = dispatcher.start(x, scores, ids)
            of_shared = shared(x) if shared else None
            rows, counts, metadata = dispatcher.finish(started)
            del started
            if experts is not None:
                rows = experts(rows, counts, metadata.routed_scores)
            out = dispatcher.combine(rows, metadata, x)
            out = out if of_shared is None else out + of_shared
            gradient, *_ = torch.autograd.grad(out, leaves, upstream)
        return gradient

    return run


def measure(routing: str, args: argparse.Namespace, device: torch.device) -> list[dict]:
    tensors = draw(routing, args, device)
    num_local = args.num_experts // dist.get_world_size()
    experts = GroupedExperts(args.dim, args.ffn_dim, num_local, 0.02)
    shared = FeedForward(args.dim, args.shared_experts * args.ffn_dim, 0.02)
    for module in (experts, shared):
        for weight in module.to(device, torch.bfloat16).parameters():
            torch.nn.init.normal_(weight, std=0.02)
    kinds = {"exchange": (False, False), "layer": (True, False), "layer with shared": (True, True)}
    works, variants = {}, build(args, device)
    for name, variant in variants.items():
        multiplying = copy.deepcopy(experts)
        multiplying.backend = variant.backend
        for what, (has_experts, has_shared) in kinds.items():
            if what == "layer with shared" or not isinstance(variant.dispatcher, InOneGo):
                parts = multiplying if has_experts else None, shared if has_shared else None
                works[what, name] = layers_in_a_row(variant.dispatcher, *parts, tensors, args.layers)
    options = {"warm_up": args.warm_up, "rounds": args.rounds, "repeats": args.repeats}
    times = take_turns(works, device.type, **options)
    expected: dict[str, torch.Tensor] = {}
    moved = {name: bytes_that_leave(v.dispatcher, tensors[2], args) for name, v in variants.items()}
    results = []
    for (what, name), work in sorted(works.items(), key=lambda item: item[0][0]):
        found, gib = work(), peak_gib(work, device.type) or 0.0
        difference = (found - expected.setdefault(what, found)).double().norm() / found.double().norm()
        mine = Spread.of(times[what, name]).scaled(1 / args.layers)
        *ms, gib = slowest((*astuple(mine), gib))
        result = {"routing": routing, "what": what, "dispatcher": name, "ms": Spread(*ms)}
        result |= {"mb_per_layer": moved[name] / 1e6, "gb_per_s": moved[name] / ms[0] / 1e6}
        result |= {"peak_gib": gib, "difference": difference.item()}
        results.append(result)
        if args.traces:
            file = f"{routing}-{what}-{name.replace(', ', '-')}-rank{dist.get_rank()}.json.gz"
            record(work, device.type, args.traces / file)
    return results


def print_results(results: list[dict]) -> None:
    rows = [
        [
            *(r[key] for key in ("routing", "what", "dispatcher")),
            format(r["ms"], ".2f"),
            f"{r['mb_per_layer']:.4g}",
            f"{r['gb_per_s']:.4g}",
            f"{r['peak_gib']:.2f}",
            f"{r['difference']:.1e}",
        ]
        for r in results
    ]
    headings = ("routing", "what", "dispatcher", "ms", "MB a layer", "GB/s", "peak GiB", "vs standard")
    print(table(headings, rows))


def print_ceilings(found: dict) -> None:
    for name, what in {"all_to_all": "all-to-all, there and back", "copy": "copied"}.items():
        if name in found:
            ms, speed = found[name]["ms"], found[name]["gb_per_s"]
            print(f"{found['rows']} rows {what}: {ms:.3f} ms, {speed:.4g} GB/s")


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sizes = {"tokens": 16384, "top_k": 8, "dim": 2048, "num_experts": 128, "ffn_dim": 768}
    sizes["shared_experts"] = 2
    for key, default in (sizes | {"layers": 8, "warm_up": 3, "rounds": 4, "repeats": 5}).items():
        parser.add_argument(f"--{key}", type=int, default=default)
    parser.add_argument("--routing", nargs="+", default=["random", "skewed"])
    parser.add_argument("--capacity_factors", nargs="+", type=float, default=[1.25, 2.0])
    parser.add_argument("--float8", action="store_true", help="also experts and exchanges in float8")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--traces", type=Path, help="folder for a profile of each, for breakdown.py")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    for key, value in SMALL.items() if args.small else ():
        setattr(args, key, value)
    return args


def main() -> None:
    args = arguments()
    on_gpu, rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    options = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    options |= {"device_id": device} if on_gpu else {}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **options)
    found = ceilings(device.type) if dist.get_rank() == 0 else {}
    found |= exchange_ceilings(args, device)
    results = [result for routing in args.routing for result in measure(routing, args, device)]
    if dist.get_rank() == 0:
        world, name = dist.get_world_size(), device_name(device.type)
        print(f"{world} ranks on {name}, torch {torch.__version__}, {args.tokens} tokens each, bfloat16")
        print_ceilings(found)
        print_results(results)
        write_report(args.json, device.type, ranks=world, ceilings=found, results=results)
    destroy_process_group()


if __name__ == "__main__":
    main()
