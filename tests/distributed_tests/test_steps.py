"""What a step of the trainer is, held against one by hand: loss, clipping, learning rate, update.

Adam's updates hardly depend on the size of gradients, so that one that is clipped wrongly does not show in
them. Here eps is so large that they are in proportion.
"""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from tests.distributed_tests.test_training import (
    COMMON,
    EXPERTS,
    PP2,
    STEPS,
    TENSOR,
    VALIDATION,
    RecordingTrainer,
    build,
    by_step,
    records,
    run,
)
from torchtitan.distributed.launch import run_ranks

MAX_NORM = 0.3
LR, EPS, DECAY = 3.0, 1.0, 0.01
SETTINGS = {
    "optimizer.lr": LR,
    "optimizer.eps": EPS,
    "optimizer.weight_decay": DECAY,
    "training.max_norm": MAX_NORM,
}
RATES = [LR * factor for factor in (0.5, 1, 1, 0.75, 0.5, 0.25)]
"""Of steps with 2 of warm-up and linear decay over the other 4, the last of which still learns."""


def run_and_repeat(settings):
    """(weights at first, at last, these by hand; losses, norms, last validation, labels by hand)."""
    trainer = build(settings, RecordingTrainer)
    trainer.run()
    [model] = trainer.model.parts
    weights = dict(model.named_parameters())
    trainer.validation_loader.restart()
    held_out = [next(trainer.validation_loader) for _ in range(2)]
    logits = torch.cat([model(batch.tokens) for batch in held_out]).flatten(0, 1)
    validation_loss = F.cross_entropy(logits, torch.cat([batch.labels for batch in held_out]).flatten()).item()
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(trainer.initial[name])
    optimizer = torch.optim.AdamW(weights.values(), betas=(0.9, 0.95), eps=EPS, weight_decay=DECAY)
    losses, norms = [], []
    for batch, lr in zip(trainer.batches, RATES, strict=True):
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.labels.flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), MAX_NORM).item())
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    valid = [int((batch.labels >= 0).sum()) for batch in trainer.batches]
    return trainer.initial, trainer.final, weights, losses, norms, validation_loss, valid


def assert_near(found, expected, start):
    """Relative to how far weights went."""
    for name, weight in expected.items():
        assert (found[name] - weight).norm() < 1e-5 * (weight - start[name]).norm(), name


def test_a_run_is_what_a_loop_by_hand_makes_of_it(tmp_path):
    settings = COMMON | SETTINGS | VALIDATION | {"validation.steps": 2}
    settings |= {"job.dump_folder": tmp_path, "training.local_batch_size": 12}
    [(start, end, by_hand, losses, norms, held_out, valid)] = run_ranks(run_and_repeat, 1, settings)
    found = records(tmp_path)
    assert list(found) == list(range(1, STEPS + 1))
    assert [record["loss"] for record in found.values()] == pytest.approx(losses, rel=1e-6)
    assert [record["grad_norm"] for record in found.values()] == pytest.approx(norms, rel=1e-5)
    assert [record["lr"] for record in found.values()] == pytest.approx(RATES, rel=1e-12)
    assert [record["n_tokens_seen"] for record in found.values()] == list(accumulate(valid))
    assert min(norms) < MAX_NORM < max(norms), norms
    assert_near(end, by_hand, start)
    assert by_step(tmp_path)[STEPS]["validation_loss"] == pytest.approx(held_out, rel=1e-6)


EP2 = {"parallelism.expert_parallel_degree": 2}
MESHES = {
    "ep2": (2, EP2),
    "pp2": (2, PP2),
    "fsdp2 x tp2, ep2": (4, EP2 | {TENSOR: 2}),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Weights of one process at first and at last."""
    folder = tmp_path_factory.mktemp("experts")
    _, start, end, _ = run(folder, **EXPERTS | SETTINGS, **{"training.local_batch_size": 12})
    return start, end


@pytest.mark.parametrize("name", MESHES)
def test_gradients_on_any_mesh_are_clipped_by_the_same_factor(experts, tmp_path, name):
    world_size, changes = MESHES[name]
    start, end = experts
    found, _, ours, _ = run(tmp_path, world_size, **EXPERTS | SETTINGS | changes)
    norms = [record["grad_norm"] for record in found.values()]
    assert min(norms) < MAX_NORM < max(norms), norms
    assert_near(ours, end, start)
