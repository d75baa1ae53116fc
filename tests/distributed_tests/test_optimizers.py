"""Muon, 8-bit AdamW, stochastic rounding: one process's weights on any layout, and checkpoints."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.distributed_tests.test_resharding import EP, LOAD, SAVED, losses, run
from torchtitan.config.schema import Optimizer
from torchtitan.distributed.launch import run_ranks
from torchtitan.optim.optimizer import build_optimizer

SPLIT_EXPERTS = {EP: 2, "parallelism.expert_tensor_parallel_degree": 2}
MUON = {"optimizer.name": "Muon", "optimizer.lr": 1e-2}
EIGHT = {"optimizer.name": "AdamW8bit", "optimizer.implementation": "for-loop"}
ROUND = {
    "optimizer.bf16_stochastic_round": True,
    "optimizer.implementation": "for-loop",
    "training.dtype": "bfloat16",
}
TABLES = ", ".join(
    [
        '{patterns = "tok_embeddings.*", lr_scale = 0.3}',
        '{patterns = "*.w2", weight_decay = 0.5, lr_scale = 2.0}',
        '{patterns = "*attention.wo.*", optimizer = "AdamW"}',
    ]
)
GROUPS = MUON | {"optimizer.groups": f"[{TABLES}]"}
KINDS = {
    "Muon": MUON,
    "Muon, groups": GROUPS,
    "AdamW8bit": EIGHT,
    "rounded": ROUND,
    "AdamW8bit, rounded": EIGHT | ROUND,
}
BAND = 0.1
"""How far AdamW8bit's weights may be from one process's, relative to how far they went; seen: 0.06."""


LOSS_BAND = 3e-4
"""How far losses may be from one process's where other draws round the weights; seen: 7e-5."""


def end_of(folder, layout, settings):
    """(weights and state at the end of a run, its losses)."""
    _, state = run(folder, layout, **settings)
    return state, losses(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """By kind, one process's weights and state after the first and the last step, and losses."""

    def run_once(kind):
        if kind not in runs:
            folder = tmp_path_factory.mktemp("one")
            start, _ = end_of(folder / "short", "one", KINDS[kind] | {"training.steps": 1})
            runs[kind] = (start, *end_of(folder / "whole", "one", KINDS[kind]))
        return runs[kind]

    runs = {}
    return run_once


def deviations(state, reference):
    """Of weights and moments, relative to how far weights went and to the moments' size.

    Norms began with 1, and rounding is a large part of how far they went.
    """
    start, end, _ = reference
    assert state.keys() == end.keys()
    found = {}
    for name, tensor in end.items():
        if tensor.ndim and tensor.is_floating_point() and tensor.any():
            went = name.startswith("model.") and not name.endswith("norm.weight")
            size = tensor - start[name] if went else tensor
            found[name] = ((state[name] - tensor).norm() / size.norm()).item()
    return found


def assert_near(found, tolerance):
    worst = sorted(found.items(), key=lambda item: -item[1])[:5]
    assert found and all(error < tolerance for error in found.values()), worst


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("fsdp3", {}),
        ("hsdp2x2", {}),
        ("tp2", {}),
        ("ep2", {}),
        ("fsdp2 x tp2, ep4", {}),
        ("fsdp2 x tp2", SPLIT_EXPERTS),
    ],
)
def test_muon_has_one_processs_weights(reference, tmp_path, layout, more):
    state, _ = end_of(tmp_path, layout, MUON | more)
    assert any("momentum_buffer" in name for name in state) and any("exp_avg" in name for name in state)
    assert_near(deviations(state, reference("Muon")), 1e-5)


@pytest.mark.parametrize("layout", ["tp2", "fsdp2 x tp2, ep4"])
def test_groups_have_one_processs_weights(reference, tmp_path, layout):
    """Moments show which optimizer updates what."""
    state, _ = end_of(tmp_path, layout, GROUPS)
    assert "exp_avg.layers.0.attention.wo.weight" in state
    assert_near(deviations(state, reference("Muon, groups")), 1e-5)
    for name in ("tok_embeddings.weight", "layers.0.moe.experts.w2"):  # not as without tables
        key = f"model.{name}"
        assert not torch.equal(reference("Muon")[1][key], reference("Muon, groups")[1][key])


def assert_near_losses(curve, expected):
    assert curve and curve != {step: expected[step] for step in curve}
    for step, loss in curve.items():
        assert loss == pytest.approx(expected[step], rel=LOSS_BAND), step


def test_rounded_weights_of_experts_train_as_one_processs(reference, tmp_path):
    _, curve = end_of(tmp_path, "ep2", ROUND)
    assert_near_losses(curve, reference("rounded")[2])


def test_rounded_weights_go_on_on_another_layout(reference, tmp_path):
    saved, _ = end_of(tmp_path, "fsdp2", ROUND | {"training.steps": SAVED})
    loaded, _ = run(tmp_path, "tp2", **ROUND)
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
    assert_near_losses(losses(tmp_path), reference("rounded")[2])


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2 x tp2, ep4"])
def test_adamw_in_8_bits_stays_near_one_process(reference, tmp_path, layout):
    """As blocks differ, so do codes; without quantization the deviation is below 1e-4."""
    state, curve = end_of(tmp_path, layout, EIGHT)
    weights = {n: e for n, e in deviations(state, reference("AdamW8bit")).items() if n.startswith("model.")}
    assert_near(weights, BAND)
    assert max(weights.values()) > 1e-4
    for step, loss in reference("AdamW8bit")[2].items():
        assert curve[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("Muon", "fsdp2 x tp2, ep4"), ("AdamW8bit", "ep2"), ("rounded", "tp2"), ("AdamW8bit, rounded", "fsdp2")],
)
def test_a_resume_on_the_same_layout_has_the_same_bits(tmp_path, kind, layout):
    whole, _ = end_of(tmp_path / "whole", layout, KINDS[kind])
    end_of(tmp_path / "parts", layout, KINDS[kind] | {"training.steps": SAVED})
    ours, _ = end_of(tmp_path / "parts", layout, KINDS[kind])
    for name, tensor in whole.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "saved_on", "loaded_on", "tolerance"),
    [
        ("Muon", "one", "fsdp2 x tp2, ep4", 1e-5),
        ("Muon", "fsdp2 x tp2", "fsdp3", 1e-5),
        ("Muon, groups", "ep2", "fsdp2 x tp2", 1e-5),
        ("AdamW8bit", "fsdp2 x tp2, ep4", "fsdp3", BAND),
        ("AdamW8bit", "ep2", "one", BAND),
    ],
)
def test_a_checkpoint_goes_on_on_another_layout(reference, tmp_path, kind, saved_on, loaded_on, tolerance):
    end_of(tmp_path, saved_on, KINDS[kind] | {"training.steps": SAVED})
    state, _ = end_of(tmp_path, loaded_on, KINDS[kind])
    weights = {n: e for n, e in deviations(state, reference(kind)).items() if n.startswith("model.")}
    assert_near(weights, tolerance)


def test_moments_of_adamw_go_on_in_8_bits(reference, tmp_path):
    """The optimizer may be changed where the state is of the same kind."""
    saved, _ = end_of(tmp_path, "fsdp2", {"training.steps": SAVED})
    folder = {"checkpoint.folder": tmp_path / "checkpoint"}
    loaded, _ = run(tmp_path / "second", "tp2", **EIGHT | LOAD | folder)
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        if name.startswith("exp_avg."):
            assert (loaded[name] - tensor).norm() <= 0.05 * tensor.norm(), name


def rounded():
    """This rank's parts after a step from ones: of a sharded and of a replicated weight."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    whole = torch.ones(64, 32, dtype=torch.bfloat16)
    params = {
        name: nn.Parameter(distribute_tensor(whole, mesh, [Replicate(), placement]))
        for name, placement in (("sharded", Shard(0)), ("replicated", Replicate()))
    }
    for param in params.values():
        param.grad = torch.ones_like(param)
    config = Optimizer(bf16_stochastic_round=True, implementation="for-loop", lr=2.0**-9)
    build_optimizer(params.items(), config, seed=1).step()
    return {name: param.to_local().detach() for name, param in params.items()}


def test_replicas_round_alike_and_shards_apart():
    first, second, third, fourth = run_ranks(rounded, 4)
    for other in (second, third, fourth):
        assert torch.equal(other["replicated"], first["replicated"])
    assert torch.equal(first["sharded"], third["sharded"])
    assert torch.equal(second["sharded"], fourth["sharded"])
    assert not torch.equal(first["sharded"], second["sharded"])
    assert 0.3 < (first["sharded"] == 1).float().mean() < 0.7
