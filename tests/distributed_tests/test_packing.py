"""Documents packed into one sequence know nothing of each other, on any layout."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.distributed_tests.test_context_parallel import EXCHANGED, HEADS, NO_SP, PLAIN, split
from tests.distributed_tests.test_data_parallel import CPU, build, job, tiny, whole
from torchtitan.data.batch import IGNORE_INDEX
from torchtitan.distributed.context_parallel import sequence_part
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.styles import loss_layout
from torchtitan.models import deepseek_v3, qwen3

LENGTHS = [[5, 1, 10], [7, 9]]
LENGTH = 16
VOCAB = 54


def packed(config, attn_type="sdpa"):
    changes = {"attn_type": attn_type, "attn_mask_type": "block_causal", "seq_len": LENGTH}
    return replace(config, **changes, vocab_size=VOCAB)


def experts(flavor):
    small = replace(flavor.shrunk(4), n_layers=2)
    return packed(replace(small, moe=replace(small.moe, experts_backend="reference")))


HEADS_FOR_FOUR = tiny(n_heads=8, n_kv_heads=4, dim=48)
MODELS = {
    **{kind: packed(HEADS_FOR_FOUR, kind) for kind in ("sdpa", "flex", "varlen")},
    "experts": experts(qwen3.FLAVORS["30B-A3B"]),
    "latent attention, experts": experts(deepseek_v3.FLAVORS["671B"]),
}
LAYOUTS = {
    "one rank": (1, job()),
    "cp2": (2, split(2)),
    "cp2, alltoall, plain": (2, split(2, EXCHANGED, PLAIN)),
    "cp4, heads": (4, split(4, HEADS)),
    "tp2": (2, split(1, tp=2)),
    "cp2 x tp2": (4, split(2, tp=2)),
    "cp2 x tp2, alltoall, no sp": (4, split(2, EXCHANGED, NO_SP, tp=2)),
    "cp2 x tp2 ep2": (4, split(2, {"expert_parallel_degree": 2}, tp=2)),
}


def batch(other_first=False):
    """Tokens and labels; the first documents' tokens may be others."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=generator)
    labels = tokens.roll(-1, dims=1)
    for row, lengths in enumerate(LENGTHS):
        labels[row, torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
        if other_first:
            first = slice(0, lengths[0])
            tokens[row, first] = torch.randint(VOCAB, (lengths[0],), generator=generator)
    return tokens, labels


def run_packed(configs, config):
    """For each model: this rank's places, its logits there, with other first documents too; gradients.

    Every data-parallel rank is given the whole batch.
    """
    results = []
    for model_config in configs:
        degrees, model = build(model_config, config)
        assert degrees.dp == 1
        part = sequence_part(config.parallelism, degrees, dist.get_rank())
        places = [place for span in part.spans(LENGTH) for place in span]
        documents = model.documents(LENGTHS, CPU)
        with loss_layout(degrees.tp, config.parallelism):
            tokens, labels = (part.cut(x) for x in batch())
            model(tokens, labels, documents).backward()
            grads = {name: whole(p.grad) for name, p in model.named_parameters()}
        with torch.no_grad():
            logits = [model(part.cut(batch(other)[0]), None, documents) for other in (False, True)]
        results.append((places, logits, grads))
    return results


def run_alone(configs):
    """The same, a document at a time."""
    results = []
    for config in configs:
        _, model = build(config, job())
        tokens, labels = batch()
        logits = []
        for row, lengths in enumerate(LENGTHS):
            for document in zip(tokens[row].split(lengths), labels[row].split(lengths), strict=True):
                ids, targets = (x[None] for x in document)
                logits.append(model(ids)[0].detach())
                model(ids, targets).backward()
        grads = {name: whole(p.grad) for name, p in model.named_parameters()}
        results.append((torch.cat(logits).view(2, LENGTH, -1), grads))
    return results


@pytest.fixture(scope="module")
def alone():
    return run_ranks(run_alone, 1, list(MODELS.values()))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_documents_are_what_they_are_alone(alone, name):
    world_size, config = LAYOUTS[name]
    spread = config.parallelism.expert_parallel_degree > 1
    names = [key for key, model in MODELS.items() if model.moe or not spread]
    ranks = run_ranks(run_packed, world_size, [MODELS[key] for key in names], config, timeout=120)
    for i, key in enumerate(names):
        logits, grads = alone[list(MODELS).index(key)]
        for rank in ranks:
            places, (ours, with_others), our_grads = rank[i]
            assert (ours - logits[:, places]).norm() < 1e-5 * logits[:, places].norm(), key
            for weight, grad in grads.items():
                assert (our_grads[weight] - grad).norm() < 1e-5 * grad.norm(), (key, weight)
            # Other tokens in the first document change no bit of the others' logits.
            for row, lengths in enumerate(LENGTHS):
                later = torch.tensor(places) >= lengths[0]
                assert torch.equal(ours[row, later], with_others[row, later]), key
                assert later.all() or not torch.equal(ours[row], with_others[row])
