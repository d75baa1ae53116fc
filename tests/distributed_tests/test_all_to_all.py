"""The all-to-all dispatchers by themselves: any number of tokens, any routing, any padding."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.distributed.expert_parallel.all_to_all import AllToAllTokenDispatcher
from torchtitan.distributed.expert_parallel.torchao import TorchAOTokenDispatcher
from torchtitan.distributed.launch import run_ranks

EXPERTS, TOP_K, DIM = 8, 3, 6
ROUTINGS = ("uniform", "one expert", "one rank", "one token")


ALIGNMENTS = (1, 4, 16, 32)
"""Rows that each expert's are a multiple of: 1 in the plain dispatcher, 16 for float8, 32 for MX; 4 is small."""


def dispatcher(score_before_experts=False, sp_size=1, alignment=1):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    rank = mesh.get_local_rank() if sp_size > 1 else 0
    options = (mesh, EXPERTS, score_before_experts, sp_size, rank)
    if alignment == 1:
        return AllToAllTokenDispatcher(*options)
    return TorchAOTokenDispatcher(*options, row_alignment=alignment)


def inputs(num_tokens, routing, seed, dtype=torch.float32):
    """x, scores and expert ids; no id comes twice for a token, as with top-k."""
    draw = torch.Generator().manual_seed(1000 * seed + num_tokens)
    x = torch.randn(num_tokens, DIM, generator=draw).to(dtype)
    scores = torch.rand(num_tokens, TOP_K, generator=draw)
    order = torch.rand(num_tokens, EXPERTS, generator=draw).argsort(1)
    if routing == "one expert":  # the first choice of all is the same
        order = torch.arange(EXPERTS).roll(-5).expand(num_tokens, -1)
    elif routing == "one rank":
        order = torch.arange(EXPERTS).flip(0).expand(num_tokens, -1)
    return x.requires_grad_(), scores.requires_grad_(), order[:, :TOP_K].contiguous()


def weights(dtype=torch.float32):
    """Each expert e computes w[e] * x + b[e], so that rows with x = 0 are not harmless."""
    draw = torch.Generator().manual_seed(7)
    shape = (2, EXPERTS, DIM)
    return torch.randn(shape, generator=draw).to(dtype).requires_grad_()


def plain(x, scores, ids, params, score_before_experts=False):
    """The same without any dispatcher."""
    rows, scores = x.unsqueeze(1), scores.unsqueeze(2)
    if score_before_experts:
        return (rows * scores * params[0][ids] + params[1][ids]).sum(1)
    return ((rows * params[0][ids] + params[1][ids]) * scores).sum(1)


def experts(rows, counts, scores, params):
    """This rank's experts on the rows that came, (R, D); NaN where there is no row."""
    first = dist.get_rank() * len(counts)
    of_row = torch.arange(first, first + len(counts)).repeat_interleave(counts)
    used = len(of_row)
    y = rows[:used] * params[0][of_row] + params[1][of_row]
    y = y if scores is None else y * scores[:used].unsqueeze(1)
    return torch.cat([y, torch.full_like(rows[used:], float("nan"))])


def run(module, x, scores, ids, params):
    rows, counts, metadata = module.dispatch(x, scores, ids)
    check_groups(module, rows, counts, metadata)
    return module.combine(experts(rows, counts, metadata.routed_scores, params), metadata, x)


def check_groups(module, rows, counts, metadata):
    """Where rows are aligned, those that nobody sent are zeros of score zero."""
    received, scores = sum(metadata.exchange.splits.num_received), metadata.routed_scores
    if not isinstance(module, TorchAOTokenDispatcher):
        assert counts.sum() == len(rows) == received
        return
    size = module.row_alignment
    assert (counts % size == 0).all() and (counts > 0).all()
    assert counts.sum() <= len(rows) <= received + len(counts) * size and len(rows) % size == 0
    assert rows.isfinite().all() and rows.ne(0).any(1).sum() <= received
    assert scores is None or (scores.isfinite().all() and scores.ne(0).sum() <= received)
    assert (rows[counts.sum() :] == 0).all()


def poison():
    torch.use_deterministic_algorithms(True)  # then torch.empty is full of NaN


def close(actual, expected, tolerance=1e-6):
    scale = max(expected.norm().item(), 1e-6)
    return (actual - expected).norm().item() <= tolerance * scale


def uneven(alignment):
    """Each rank has another number of tokens, from none on; three steps each."""
    poison()
    module, rank, world = dispatcher(alignment=alignment), dist.get_rank(), dist.get_world_size()
    for routing in ROUTINGS:
        for step in range(3):
            params = weights()
            sizes = [(3 * r + 5 * step) % 11 for r in range(world)]
            if routing == "one token":
                sizes = [int(r == step % world) for r in range(world)]
            x, scores, ids = inputs(sizes[rank], routing, rank)
            out = run(module, x, scores, ids, params)
            out.sin().sum().backward()
            dist.all_reduce(params.grad)

            reference = weights()
            all_inputs = [inputs(size, routing, r) for r, size in enumerate(sizes)]
            outs = [plain(*each, reference) for each in all_inputs]
            sum(each.sin().sum() for each in outs).backward()
            assert close(out, outs[rank]), (routing, step)
            assert close(x.grad, all_inputs[rank][0].grad), (routing, step)
            assert close(scores.grad, all_inputs[rank][1].grad), (routing, step)
            assert close(params.grad, reference.grad), (routing, step)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_uneven_numbers_of_tokens(world, alignment):
    run_ranks(uneven, world, alignment)


def padded(score_before_experts, alignment):
    """All ranks have the same tokens and dispatch a slice each; T is 0 to 3 * sp_size + 1."""
    poison()
    world = dist.get_world_size()
    module = dispatcher(score_before_experts, world, alignment)
    for num_tokens in range(3 * world + 2):
        for routing in ROUTINGS[:3]:
            params, reference = weights(), weights()
            x, scores, ids = inputs(num_tokens, routing, 0)
            x2, scores2, _ = inputs(num_tokens, routing, 0)
            out = run(module, x, scores, ids, params)
            assert len(out) == num_tokens
            whole = out.detach().clone()
            dist.all_reduce(whole)
            expected = plain(x2, scores2, ids, reference, score_before_experts)
            assert close(whole, expected), (num_tokens, routing)
            # The rows of other ranks' slices are exactly zero, so that adding up changes no bit.
            size = -(-num_tokens // world)
            own = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
            mask = torch.ones(num_tokens, dtype=torch.bool)
            mask[own] = False
            assert (out[mask] == 0).all()
            torch.autograd.backward(out, expected.detach().cos())
            expected.backward(expected.detach().cos())
            for tensor in (x, scores, params):
                dist.all_reduce(tensor.grad)
            assert close(x.grad, x2.grad), (num_tokens, routing)
            assert close(scores.grad, scores2.grad), (num_tokens, routing)
            assert close(params.grad, reference.grad), (num_tokens, routing)
            unused = torch.ones(EXPERTS, dtype=torch.bool)
            unused[ids.flatten()] = False
            assert (params.grad[:, unused] == 0).all(), (num_tokens, routing)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("score_before_experts", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_tokens_is_padded(world, score_before_experts, alignment):
    run_ranks(padded, world, score_before_experts, alignment)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations_of_dispatch(num_tokens, sp_size):
    x, scores, ids = inputs(num_tokens, "uniform", 0)
    module = dispatcher(sp_size=sp_size)
    with Operations() as seen:
        module.dispatch(x, scores, ids)
    return [name for name in seen.names if "slice" not in name and "detach" not in name]


def compare_operations():
    unpadded = operations_of_dispatch(8, 1)
    assert operations_of_dispatch(8, 2) == unpadded
    pads = [name for name in operations_of_dispatch(7, 2) if "pad" in name]
    assert len(pads) == (3 if dist.get_rank() == 1 else 0)


def test_a_divisible_number_of_tokens_costs_no_operation():
    run_ranks(compare_operations, 2)


def count_collectives(alignment):
    module = dispatcher(alignment=alignment)
    params = weights()
    x, scores, ids = inputs(5, "uniform", dist.get_rank())
    all_to_all = torch.ops.c10d_functional.all_to_all_single
    with CommDebugMode() as counted:
        out = run(module, x, scores, ids, params)
    assert counted.get_comm_counts() == {all_to_all: 1 + 2}
    with CommDebugMode() as counted:
        out.sum().backward()
    assert counted.get_comm_counts() == {all_to_all: 2}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_one_exchange_of_counts_and_two_of_rows(alignment):
    run_ranks(count_collectives, 2, alignment)


def same_bits(dtype, alignment):
    """A row's result does not depend on how many rows lie beside it."""
    alone, module = dispatcher(), dispatcher(sp_size=dist.get_world_size(), alignment=alignment)
    params = weights(dtype)
    for num_tokens in (1, 3, 5, 6, 7, 8):
        x, scores, ids = inputs(num_tokens, "uniform", 3, dtype)
        out = run(module, x, scores, ids, params).detach()
        dist.all_reduce(out)
        assert torch.equal(out, run(alone, x, scores, ids, params)), num_tokens


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_no_bit(dtype, alignment):
    run_ranks(same_bits, 4, dtype, alignment)
