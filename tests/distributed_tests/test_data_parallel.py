"""Every data-parallel layout has the weights and gradients of one process."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torchtitan.build import build_model
from torchtitan.config.schema import (
    ActivationCheckpoint,
    Compile,
    Debug,
    JobConfig,
    Parallelism,
    Training,
)
from torchtitan.data.batch import IGNORE_INDEX
from torchtitan.distributed.context_parallel import sequence_part
from torchtitan.distributed.fsdp import Precision, sync_gradients
from torchtitan.distributed.grad_norm import global_grad_norm
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.mesh import Degrees
from torchtitan.distributed.styles import loss_layout
from torchtitan.models.llama3 import FLAVORS

CPU = torch.device("cpu")
SEQUENCES = 12
DOCUMENTS = [[3, 5], [8], [1, 1, 6], [5, 2, 1]]
"""Lengths of documents in every fourth sequence, where attention keeps to them."""


def tiny(**changes):
    base = replace(FLAVORS["debugmodel"], dim=20, n_layers=3, n_heads=2, n_kv_heads=1, ffn_dim=28)
    return replace(base, **{"vocab_size": 54, "seq_len": 8} | changes)


def global_batch(length=8):
    """Ragged on purpose: some sequences, and so some ranks, have few valid labels or none."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(54, (SEQUENCES, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:3] = IGNORE_INDEX
    labels[5, 2:] = IGNORE_INDEX
    return tokens[:, :-1], labels


def build(model_config, config):
    degrees = Degrees.resolve(config.parallelism, dist.get_world_size())
    precision = Precision.resolve(config, CPU)
    [model] = build_model(model_config, degrees, precision, config, CPU).parts
    return degrees, model


def gradients(model_config, config, microbatches=1):
    """Weights, gradients, summed loss and grad norm of one global batch on this rank's layout."""
    degrees, model = build(model_config, config)
    return gradients_of(model, degrees, config, microbatches)


def gradients_of(model, degrees, config, microbatches):
    """The same of a model that is built, on sequences of its length."""
    batch = global_batch(model.config.seq_len)
    slots = degrees.slots(dist.get_rank(), SEQUENCES)
    part = sequence_part(config.parallelism, degrees, dist.get_rank())
    tokens, labels = (part.cut(x[slots.start : slots.stop]) for x in batch)
    valid = (batch[1] != IGNORE_INDEX).sum()
    total = torch.zeros(())
    each = config.training.sync_gradients_each_microbatch
    rows = torch.tensor(slots).chunk(microbatches)
    pairs = list(zip(tokens.chunk(microbatches), labels.chunk(microbatches), rows, strict=True))
    with loss_layout(degrees.tp, config.parallelism):
        for i, (inputs, targets, numbers) in enumerate(pairs):
            sync_gradients(model, i == microbatches - 1, each)
            documents = model.documents([DOCUMENTS[number % 4] for number in numbers], CPU)
            loss = model(inputs, targets, documents) / valid
            loss.backward()
            total += loss.detach()
    norm, total = global_grad_norm(model.parameters(), total / degrees.tp, degrees.stage_size)
    named = list(model.named_parameters())
    weights = {name: whole(p) for name, p in named}
    return weights, {name: whole(p.grad) for name, p in named}, total.item(), norm.item()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def job(replicate=1, reshard="default", training=None, ac="none", compiled=False, tp=None, **ac_options):
    return JobConfig(
        # Not what this CPU is fastest in: some are fast in bfloat16.
        training=Training(**{"mixed_precision_param": "float32"} | (training or {})),
        parallelism=Parallelism(
            data_parallel_replicate_degree=replicate,
            fsdp_reshard_after_forward=reshard,
            **(tp or {}),
        ),
        debug=Debug(seed=0),
        activation_checkpoint=ActivationCheckpoint(mode=ac, **ac_options),
        compile=Compile(enable=compiled, backend="aot_eager"),
    )


EACH = {"sync_gradients_each_microbatch": True}
LAYOUTS = {
    "fsdp2": (2, job(), 1),
    "fsdp3": (3, job(), 1),
    "fsdp4": (4, job(), 1),
    "replicate2": (2, job(2), 1),
    "hsdp2x2": (4, job(2), 1),
    "never reshard": (2, job(reshard="never"), 1),
    "always reshard": (2, job(reshard="always"), 1),
    "accumulate": (2, job(), 3),
    "accumulate, reduce each": (2, job(training=EACH), 3),
    "hsdp2x2, accumulate": (4, job(2), 3),
    "hsdp2x2, accumulate, reduce each": (4, job(2, training=EACH), 3),
    "offload": (2, job(training={"enable_cpu_offload": True}), 2),
    "one rank, offload": (1, job(training={"enable_cpu_offload": True}), 2),
    "one rank, accumulate": (1, job(), 4),
    "full ac": (2, job(ac="full"), 1),
    "every second layer ac": (2, job(ac="selective", selective_ac_option="2"), 1),
    "by-op ac": (2, job(ac="selective", selective_ac_option="op"), 1),
    "compile": (2, job(compiled=True), 1),
    "compile, full ac": (2, job(compiled=True, ac="full"), 1),
    "compile, by-op ac": (2, job(compiled=True, ac="selective", selective_ac_option="op"), 1),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def reference(request):
    config = tiny(enable_weight_tying=request.param)
    return config, run_ranks(gradients, 1, config, job())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_process(reference, name):
    assert_equals_one_process(reference, LAYOUTS[name])


def assert_equals_one_process(reference, layout):
    """layout is (ranks, config, microbatches)."""
    model_config, expected = reference
    world_size, config, microbatches = layout
    ranks = run_ranks(gradients, world_size, model_config, config, microbatches, timeout=180)
    assert_equal_on_all_ranks(expected, ranks)


def assert_equal_on_all_ranks(expected, ranks):
    """Weights bit-equal, gradients, loss and norm equal to those of one process."""
    weights, grads, loss, norm = expected
    for their_weights, their_grads, their_loss, their_norm in ranks:
        assert their_norm == ranks[0][3]  # the same bits on every rank
        assert their_norm == pytest.approx(norm, rel=1e-6)
        assert their_loss == pytest.approx(loss, rel=1e-6)
        for key, grad in grads.items():
            assert torch.equal(their_weights[key], weights[key]), key
            assert (their_grads[key] - grad).norm() < 1e-5 * grad.norm(), key


def test_bfloat16_is_the_same_policy_at_any_world_size():
    config = job(training={"mixed_precision_param": "bfloat16"})
    alone = run_ranks(gradients, 1, tiny(), config)[0]
    accumulated = run_ranks(gradients, 1, tiny(), config, 4)[0]
    ranks = run_ranks(gradients, 2, tiny(), config)
    for key, grad in alone[1].items():
        # What FSDP reduces in fp32 a rank alone leaves as it is; what adds up does so in fp32.
        assert grad.dtype == torch.bfloat16
        for other in (ranks[0][1][key], accumulated[1][key]):
            assert other.dtype == torch.float32
            assert (other - grad).norm() < 2e-2 * grad.norm(), key
    exact = run_ranks(gradients, 1, tiny(), job())[0]
    errors = [(alone[1][k] - g).norm() / g.norm() for k, g in exact[1].items()]
    assert max(errors) > 1e-4  # it did compute in bfloat16


def test_the_two_uses_of_a_tied_weight_add_up_in_float32():
    """On one rank, where other gradients stay in the compute dtype."""
    config = job(training={"mixed_precision_param": "bfloat16"})
    [(_, grads, *_)] = run_ranks(gradients, 1, tiny(enable_weight_tying=True), config)
    tied = grads.pop("tok_embeddings.weight")
    assert tied.dtype == grads.pop("norm.weight").dtype == torch.float32
    assert {grad.dtype for grad in grads.values()} == {torch.bfloat16}


@contextmanager
def saved_tensors(model):
    """Collects what forward keeps for backward, weights and their views aside: {address: tensor}."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor  # alive, so addresses stay apart
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def num_bytes(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def saved_bytes(config):
    _, model = build(tiny(), config)
    with saved_tensors(model) as kept:
        model(*global_batch())
    return num_bytes(kept)


def test_checkpointing_saves_memory():
    modes = [
        job(),
        job(ac="selective", selective_ac_option="2"),
        job(ac="full"),
    ]
    sizes = [run_ranks(saved_bytes, 1, config)[0] for config in modes]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3, sizes
