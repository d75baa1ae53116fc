"""Matrices in parts: brought together, made orthogonal by one rank each, and taken apart again."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from torchtitan.config.schema import Optimizer
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.local_parts import local_part
from torchtitan.optim.muon import orthogonal
from torchtitan.optim.optimizer import build_optimizer
from torchtitan.optim.whole_matrices import cuts_of, on_whole_matrices

LAYOUTS = {
    # ranks for FSDP and its dim, ranks for tensor parallelism and its dim
    "rows": ((2, 0), (1, None)),
    "uneven rows": ((3, 0), (1, None)),
    "tensor-parallel rows": ((1, 0), (2, -2)),
    "tensor-parallel columns": ((1, 0), (2, -1)),
    "rows of rows": ((2, 0), (2, -2)),
    "rows of columns": ((2, 0), (2, -1)),
    "columns of columns": ((2, -1), (2, -1)),
}
SHAPES = {
    "matrix": (8, 12),
    "fewer rows than ranks": (2, 12),
    "w13": (4, 2, 8, 12),
    "w2": (4, 12, 8),
    "more ranks than experts": (1, 12, 8),
}


class Weights(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = nn.ParameterList(weights)


def spread(weights, layout):
    """Parameters of these values, split by tensor parallelism and then by FSDP."""
    (fsdp, fsdp_dim), (tp, tp_dim) = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", (fsdp, tp), mesh_dim_names=("fsdp", "tp"))
    if tp > 1:
        weights = [distribute_tensor(w, mesh["tp"], [Shard(tp_dim % w.ndim)]) for w in weights]
    model = Weights([nn.Parameter(weight) for weight in weights])
    fully_shard(
        model, mesh=mesh["fsdp"], shard_placement_fn=lambda weight: Shard(fsdp_dim % weight.ndim)
    )
    return list(model.weights)


def numbers(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def train(params, values):
    """Three steps with gradients of these values."""
    named = [(f"layers.{n}.w", param) for n, param in enumerate(params)]
    config = Optimizer(name="Muon", lr=1.0, weight_decay=0.1)
    optimizer = build_optimizer(named, config)
    for step in range(3):
        for param, value in zip(params, values[step], strict=True):
            param.grad = value
            if isinstance(param, DTensor):
                spread = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
                param.grad = spread
        optimizer.step()
    weights = [param.detach() for param in params]
    return [w.full_tensor() if isinstance(w, DTensor) else w for w in weights]


def deviations(layout):
    """Of updates on this layout from those of one process, by shape: several matrices of each."""
    found = {}
    for name, shape in SHAPES.items():
        fsdp_dim = LAYOUTS[layout][0][1] % len(shape)
        (fsdp, _), (tp, _) = LAYOUTS[layout]
        if fsdp_dim > 0 and shape[fsdp_dim] % (fsdp * tp):
            continue  # not for FSDP
        shapes = [shape] * 5
        weights, *grads = (numbers(seed, *shapes) for seed in range(4))
        expected = train([nn.Parameter(weight.clone()) for weight in weights], grads)
        got = train(spread(weights, layout), grads)
        changes = [(e - w).norm() for e, w in zip(expected, weights, strict=True)]
        errors = [(g - e).norm() / c for g, e, c in zip(got, expected, changes, strict=True)]
        found[name] = max(errors).item()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_updates_equal_unsharded_ones(layout):
    (fsdp, _), (tp, _) = LAYOUTS[layout]
    for found in run_ranks(deviations, fsdp * tp, layout):
        assert len(found) >= 4
        assert all(error < 1e-5 for error in found.values()), found


def work(layout, shape, num_params):
    """(matrices that each call works on, collectives) of this rank for a stack of parameters."""
    params = spread(numbers(0, *[shape] * num_params), layout)
    calls = []

    def note(matrices):
        calls.append(tuple(matrices.shape))
        return orthogonal(matrices)

    parts = [local_part(param).detach() for param in params]
    parts = torch.cat([part.reshape(-1, *part.shape[-2:]) for part in parts])
    with CommDebugMode() as counter:
        on_whole_matrices(note, parts, cuts_of(params[0]))
    return calls, sum(counter.get_comm_counts().values())


@pytest.mark.parametrize(
    ("layout", "shape", "num_params", "expected"),
    [
        ("rows", (8, 12), 2, [[(1, 8, 12)]] * 2),
        ("rows", (8, 12), 1, [[(1, 8, 12)], [(0, 8, 12)]]),
        ("uneven rows", (8, 12), 5, [[(2, 8, 12)], [(2, 8, 12)], [(1, 8, 12)]]),
        ("rows of columns", (8, 12), 4, [[(1, 8, 12)]] * 4),
        ("rows", (4, 2, 8, 12), 1, [[(4, 8, 12)]] * 2),  # by expert: nothing is exchanged
        ("columns of columns", (4, 12, 8), 1, [[(1, 12, 8)]] * 4),
    ],
)  # fmt: skip
def test_ranks_share_the_work(layout, shape, num_params, expected):
    (fsdp, _), (tp, _) = LAYOUTS[layout]
    found = run_ranks(work, fsdp * tp, layout, shape, num_params)
    assert [calls for calls, _ in found] == expected
    by_expert = len(shape) > 2 and layout == "rows"
    axes = (fsdp > 1) + (tp > 1)
    assert {exchanges for _, exchanges in found} == {0 if by_expert else 2 * axes}


def batches_of(num_params):
    """How many parameters a step of Muon puts together."""
    from torchtitan.optim.muon import _batches

    params = spread(numbers(0, *[(8, 12)] * num_params), "rows")
    return [len(batch) for batch, _ in _batches(params)]


def test_no_more_matrices_than_ranks_are_whole_at_a_time():
    assert run_ranks(batches_of, 2, 5) == [[2, 2, 1]] * 2


def test_more_than_two_ranks_hold_what_dtensor_says():
    """The lengths of parts are computed here as there; cuts_of asserts it, and this shows that it can fail."""
    run_ranks(check_parts, 3)


def check_parts():
    for rows in range(1, 8):
        (param,) = spread(numbers(0, (rows, 4)), "uneven rows")
        assert cuts_of(param)[0].length == rows
    local = torch.zeros(dist.get_rank() + 1, 4)
    mesh = init_device_mesh("cpu", (3,))
    odd = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(6, 4), stride=(4, 1))
    if dist.get_rank() != 1:
        with pytest.raises(AssertionError, match="a part"):
            cuts_of(odd)
