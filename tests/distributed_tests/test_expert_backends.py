"""Models with other dispatchers than all-to-all, over what stands for GPU memory and DeepEP on CPUs."""

import logging
import sys
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest

from tests.distributed_tests import deep_ep
from tests.distributed_tests.test_data_parallel import SEQUENCES, assert_equal_on_all_ranks
from tests.distributed_tests.test_expert_load import EXPERT, MOE
from tests.distributed_tests.test_moe_layouts import (
    BY_OP,
    FULL,
    MODELS,
    gradients_of_all,
    parallel,
)
from tests.distributed_tests.test_peer_exchange import FileMemory
from tests.distributed_tests.test_training import (
    COMMON,
    CONTEXT,
    PP2,
    TENSOR,
    build,
    records,
    train,
)
from torchtitan import preflight
from torchtitan.distributed.expert_parallel import dispatchers
from torchtitan.distributed.launch import RankFailure, run_ranks
from torchtitan.logging import logger
from torchtitan.trainer import Trainer

BACKEND = "parallelism.expert_parallel_comm_backend"
LAYOUTS = {
    "ep2": (2, parallel(ep=2), 1),
    "ep2, accumulate, full ac": (2, parallel(ep=2, **FULL), 3),
    "fsdp2 x ep2, by-op ac": (4, parallel(ep=2, **BY_OP), 1),
    "tp2 ep2": (2, parallel(tp=2, ep=2), 1),
    "tp2 ep2, no sp": (2, parallel(tp=2, ep=2, sp=False), 1),
    "fsdp2 x tp2 ep2 etp2, full ac": (4, parallel(tp=2, ep=2, etp=2, **FULL), 1),
}


def on_cpu(folder, function, *args):
    """function(*args), with what stands for GPUs in place."""
    library = patch.dict(sys.modules, {"deep_ep": deep_ep})
    memory = patch.object(dispatchers, "SymmetricMemory", partial(FileMemory, folder))
    allowed = patch.object(preflight, "check_comm_backend", lambda *args: None)
    with library, memory, allowed:
        return function(*args)


@pytest.fixture(scope="module")
def references():
    return run_ranks(gradients_of_all, 1, MODELS, parallel())[0]


@pytest.mark.parametrize("backend", ["deepep", "symmetric_memory"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_process(references, name, backend, tmp_path):
    world_size, config, microbatches = LAYOUTS[name]
    dp = world_size // config.parallelism.tensor_parallel_degree
    config = replace(
        config,
        parallelism=replace(config.parallelism, expert_parallel_comm_backend=backend),
        training=replace(config.training, local_batch_size=SEQUENCES // dp // microbatches, seq_len=8),
    )
    args = gradients_of_all, MODELS, config, microbatches
    ranks = run_ranks(on_cpu, world_size, tmp_path, *args, timeout=180)
    for i, reference in enumerate(references):
        assert_equal_on_all_ranks(reference, [rank[i] for rank in ranks])


SHARED = COMMON | MOE | {EXPERT: 2, BACKEND: "symmetric_memory"}
VALIDATED = {
    "validation.enable": True,
    "validation.dataset": "c4_test_validation",
    "validation.local_batch_size": 2,
    "validation.seq_len": 48,
    "validation.steps": 1,
    "validation.freq": 2,
}
RUNS = {
    "cp2 ep2": (2, {CONTEXT: 2}),
    "pp2 x ep2": (4, PP2),
    "tp2 ep2, no sp": (2, {TENSOR: 2, "parallelism.no_enable_sequence_parallel": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_as_with_all_to_all(tmp_path, name):
    world_size, changes = RUNS[name]
    found = []
    for backend in ("standard", "symmetric_memory"):
        folder = tmp_path / backend
        settings = SHARED | VALIDATED | changes | {"job.dump_folder": folder, BACKEND: backend}
        run_ranks(on_cpu, world_size, tmp_path, train, settings, timeout=120)
        found.append([(r["loss"], r["grad_norm"]) for r in records(folder).values()])
    assert found[1] == [pytest.approx(pair, rel=1e-6) for pair in found[0]]


def test_more_rows_than_there_is_room_for_end_the_run(tmp_path):
    factor = {"parallelism.symmetric_memory_capacity_factor": 1}
    said = r"NonFinite: step 1: loss nan, .*layers\.\d sent a rank 1\.\d\d times the rows .*capacity_factor"
    with pytest.raises(RankFailure, match=said):
        settings = SHARED | factor | {"job.dump_folder": tmp_path}
        run_ranks(on_cpu, 2, tmp_path, train, settings, timeout=120)


def warnings_of(settings):
    """What a run warns of."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    trainer = build(settings, Trainer)
    logger.addHandler(handler)
    trainer.run()
    return said


def test_validation_says_where_it_has_no_room(tmp_path):
    """Its sequences are longer, so training has room, and no load is quite even."""
    factor = {"parallelism.symmetric_memory_capacity_factor": 1}
    longer = {"validation.seq_len": 256, "training.steps": 1, "job.dump_folder": tmp_path}
    args = tmp_path, warnings_of, SHARED | VALIDATED | factor | longer
    said, _ = run_ranks(on_cpu, 2, *args, timeout=120)
    assert [text for text in said if text.startswith("validation loss nan: layers.1 sent a rank 1.")]
