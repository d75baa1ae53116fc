"""MoE models on every layout have the weights, gradients and statistics of one process."""

import pytest
import torch

from tests.distributed_tests.test_data_parallel import (
    SEQUENCES,
    assert_equal_on_all_ranks,
    gradients,
    job,
    tiny,
)
from torchtitan.distributed.launch import run_ranks
from torchtitan.models.moe.config import MoEConfig


def parallel(tp=1, ep=1, etp=1, sp=True, replicate=1, **more):
    degrees = {
        "tensor_parallel_degree": tp,
        "expert_parallel_degree": ep,
        "expert_tensor_parallel_degree": etp,
        "enable_sequence_parallel": sp,
    }
    batch = {"global_batch_size": SEQUENCES, "local_batch_size": 1}  # balance losses are means over it
    return job(replicate, tp=degrees, training=batch, **more)


BY_OP = {"ac": "selective", "selective_ac_option": "op"}
FULL = {"ac": "full"}
LAYOUTS = {
    "fsdp2": (2, parallel(), 1),
    "fsdp3, full ac": (3, parallel(**FULL), 1),
    "hsdp2x2": (4, parallel(replicate=2), 1),
    "ep2": (2, parallel(ep=2), 1),
    "ep = world": (4, parallel(ep=4), 1),
    "fsdp2 x ep2": (4, parallel(ep=2), 1),
    "fsdp3 x ep2": (6, parallel(ep=2), 2),
    "hsdp2 x ep2": (4, parallel(replicate=2, ep=2), 1),
    "ep2, accumulate": (2, parallel(ep=2), 3),
    "ep2, full ac": (2, parallel(ep=2, **FULL), 1),
    "ep2, by-op ac": (2, parallel(ep=2, **BY_OP), 1),
    "tp2": (2, parallel(tp=2), 1),
    "tp2, no sp": (2, parallel(tp=2, sp=False), 1),
    "tp2, full ac": (2, parallel(tp=2, **FULL), 1),
    "fsdp2 x tp2, by-op ac": (4, parallel(tp=2, **BY_OP), 1),
    "tp2 ep2": (2, parallel(tp=2, ep=2), 1),
    "tp2 ep2, no sp": (2, parallel(tp=2, ep=2, sp=False), 1),
    "tp4 ep2": (4, parallel(tp=4, ep=2), 1),
    "tp4 ep4, no sp, by-op ac": (4, parallel(tp=4, ep=4, sp=False, **BY_OP), 1),
    "fsdp2 x tp2 ep4": (4, parallel(tp=2, ep=4), 1),
    "fsdp2 x tp2 ep4, no sp, full ac": (4, parallel(tp=2, ep=4, sp=False, **FULL), 2),
    "fsdp2 x tp2 ep2": (4, parallel(tp=2, ep=2, **FULL), 1),
    "fsdp2 x tp2 ep2 etp2": (4, parallel(tp=2, ep=2, etp=2), 1),
    "fsdp2 x tp2 ep2 etp2, no sp": (4, parallel(tp=2, ep=2, etp=2, sp=False), 1),
    "fsdp2 x tp2 ep2 etp2, full ac": (4, parallel(tp=2, ep=2, etp=2, **FULL), 1),
    "hsdp2x2 x tp2 ep2 etp2": (8, parallel(tp=2, ep=2, etp=2, replicate=2), 1),
    "fsdp4 x tp2 ep2 etp2": (8, parallel(tp=2, ep=2, etp=2), 1),
    "hsdp2x2 x tp2 ep2, by-op ac": (8, parallel(tp=2, ep=2, replicate=2, **BY_OP), 1),
    "fsdp2, compile, full ac": (2, parallel(compiled=True, **FULL), 1),
    "fsdp2, compile, by-op ac": (2, parallel(compiled=True, **BY_OP), 1),
    "ep2, compile, by-op ac": (2, parallel(ep=2, compiled=True, **BY_OP), 1),
    "tp2 ep2, no sp, compile, full ac": (
        2,
        parallel(tp=2, ep=2, sp=False, compiled=True, **FULL),
        1,
    ),
}


def moe(**changes):
    config = MoEConfig(num_experts=8, top_k=2, ffn_dim=12, num_shared_experts=1, **changes)
    return tiny(n_heads=4, n_kv_heads=4, dim=24, moe=config, n_dense_layers=1)


MODELS = [
    moe(load_balance_coeff=1e-3, sequence_balance_coeff=0.1, router_z_coeff=0.01),
    moe(score_before_experts=True, score_func="sigmoid", route_norm=True),
]


def gradients_of_all(models, *args):
    return [gradients(model, *args) for model in models]


@pytest.fixture(scope="module")
def references():
    return run_ranks(gradients_of_all, 1, MODELS, parallel())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_process(references, name):
    world_size, config, microbatches = LAYOUTS[name]
    ranks = run_ranks(gradients_of_all, world_size, MODELS, config, microbatches, timeout=180)
    for i, reference in enumerate(references):
        assert_equal_on_all_ranks(reference, [rank[i] for rank in ranks])


@pytest.mark.parametrize("options", [{}, {"compiled": True}, BY_OP], ids=["eager", "compile", "by-op ac"])
def test_experts_of_one_rank_alone_compute_in_bfloat16_as_one_process_does(options):
    model, bfloat16 = moe(), {"mixed_precision_param": "bfloat16"}
    batch = {"global_batch_size": SEQUENCES, "local_batch_size": 1} | bfloat16
    alone = job(training=batch, **options)
    spread = job(tp={"expert_parallel_degree": 2}, training=batch, **options)
    _, expected, loss, norm = run_ranks(gradients, 1, model, alone)[0]
    dtypes = []
    for ranks in (run_ranks(gradients, 2, model, spread), run_ranks(gradients, 2, model, spread, 3)):
        assert ranks[0][2:] == ranks[1][2:]
        assert ranks[0][2] == pytest.approx(loss, rel=1e-3)
        assert ranks[0][3] == pytest.approx(norm, rel=1e-2)
        for key, grad in ranks[0][1].items():
            assert (grad.float() - expected[key]).norm() < 4e-2 * expected[key].float().norm(), key
        dtypes.append({".moe.experts." in key: grad.dtype for key, grad in ranks[0][1].items()})
    # FSDP reduces the others' in fp32; those of three microbatches add up in it.
    assert dtypes == [{False: torch.float32, True: torch.bfloat16}, {False: torch.float32, True: torch.float32}]
