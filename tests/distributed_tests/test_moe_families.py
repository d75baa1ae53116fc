"""What families add to MoE layers and attention has the gradients of one process on every layout."""

from dataclasses import dataclass, replace

import pytest

from tests.distributed_tests.test_context_parallel import HEADS
from tests.distributed_tests.test_context_parallel_families import split
from tests.distributed_tests.test_data_parallel import assert_equal_on_all_ranks, gradients
from tests.distributed_tests.test_moe_layouts import BY_OP, FULL, gradients_of_all, parallel
from torchtitan.distributed.launch import run_ranks
from torchtitan.models import gpt_oss, llama4, mixtral
from torchtitan.models.init import Normal, PerExpert


@dataclass(frozen=True)
class DrawnBiases(gpt_oss.GptOssConfig):
    """gpt-oss whose biases do not start as zeros: one that is added twice shows."""

    def build(self):
        model = super().build()
        for module in model.modules():
            for name in getattr(module, "inits", {}):
                if name.endswith("bias"):
                    module.inits[name] = Normal(0.1)
                elif name in ("b13", "b2"):
                    module.inits[name] = PerExpert(Normal(0.1))
        return model


SIZES = {"seq_len": 8, "vocab_size": 54}
MODELS = {
    "mixtral": replace(mixtral.FLAVORS["8x7B"].shrunk(2), n_layers=1, **SIZES),
    # A layer with a window of 4 and one without.
    "gpt_oss": DrawnBiases(**vars(gpt_oss.FLAVORS["20b"].shrunk(2)) | SIZES | {"n_layers": 2}),
    # Dense and MoE layers, chunks of 6, and a layer without positions.
    "llama4": replace(llama4.FLAVORS["17bx128e_irope"].shrunk(2), qk_norm=True, **SIZES),
}
LAYOUTS = {
    "fsdp2": (2, parallel(), 1),
    "tp2": (2, parallel(tp=2), 1),
    "tp2, no sp, full ac": (2, parallel(tp=2, sp=False, **FULL), 1),
    "fsdp2 x tp2, by-op ac": (4, parallel(tp=2, **BY_OP), 1),
    "ep2, by-op ac": (2, parallel(ep=2, **BY_OP), 1),
    "tp2 ep2": (2, parallel(tp=2, ep=2), 1),
    "tp2 ep2, no sp, full ac": (2, parallel(tp=2, ep=2, sp=False, **FULL), 1),
    "fsdp2 x tp2 ep2 etp2": (4, parallel(tp=2, ep=2, etp=2), 1),
    "fsdp2 x tp2 ep2 etp2, no sp, by-op ac": (4, parallel(tp=2, ep=2, etp=2, sp=False, **BY_OP), 2),
    "cp2": (2, split(2), 1),
    "cp2, heads": (2, split(2, HEADS), 1),
    "tp2, compile, by-op ac": (2, parallel(tp=2, compiled=True, **BY_OP), 1),
}


def test_biases_of_fewer_experts_than_ranks():
    """Weights are sharded along the hidden width then, which an output's bias does not have."""
    config = MODELS["gpt_oss"]
    config = replace(config, n_layers=1, moe=replace(config.moe, num_experts=3, top_k=2))
    reference = run_ranks(gradients, 1, config, parallel())[0]
    assert_equal_on_all_ranks(reference, run_ranks(gradients, 4, config, parallel()))


@pytest.fixture(scope="module")
def references():
    return run_ranks(gradients_of_all, 1, list(MODELS.values()), parallel())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_process(references, name):
    world_size, config, microbatches = LAYOUTS[name]
    models = list(MODELS.values())
    ranks = run_ranks(gradients_of_all, world_size, models, config, microbatches, timeout=180)
    for i, reference in enumerate(references):
        assert_equal_on_all_ranks(reference, [rank[i] for rank in ranks])
