"""Rank 0 chooses between kernels of experts for all ranks, by the shape that experts really get.

CPUs have nothing to choose: what a GPU can do and how long it takes is made up here.
"""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.distributed_tests.test_expert_load import EXPERT, MOE
from tests.distributed_tests.test_training import COMMON, CONTEXT, PP2, TENSOR, build
from torchtitan import kernel_choice
from torchtitan.distributed.launch import run_ranks
from torchtitan.distributed.local_parts import local_part
from torchtitan.kernel_choice import FILE, Shape
from torchtitan.models.moe.experts import GroupedExperts
from torchtitan.trainer import Trainer

SETTINGS = COMMON | MOE | {"model.overrides.moe.top_k": 2, "training.steps": 1}
TIMES = [{"fused": 2.0, "unfused": 1.0}, {"fused": 1.0, "unfused": 2.0}]
"""What rank 0 and the others would measure."""


def backends(runs, on_gpu=True):
    """For each of these settings the backends of this rank's experts, and the shapes it measured."""
    measured = []

    def measure(shape, device):
        measured.append(shape)
        return TIMES[min(dist.get_rank(), 1)]

    results = []
    with ExitStack() as stack:
        stack.enter_context(patch.object(kernel_choice, "measure", measure))
        stack.enter_context(patch.object(torch.cuda, "get_device_name", lambda device: "a GPU"))
        if on_gpu:
            stack.enter_context(patch.object(kernel_choice, "can_fuse", lambda *args: True))
        for settings in runs:
            measured.clear()
            trainer = build(settings, Trainer)
            names = {module.backend for module in experts_of(trainer)}
            results.append((names, len(measured)))
    return results


def experts_of(trainer):
    return [module for _, module in trainer.model.named_modules() if isinstance(module, GroupedExperts)]


@pytest.mark.parametrize("layout", [{EXPERT: 2}, PP2], ids=["ep2", "pp2, no experts on rank 0"])
def test_all_ranks_use_what_rank_0_measured_once(layout, tmp_path):
    settings = SETTINGS | layout | {"job.dump_folder": tmp_path, "training.local_batch_size": 2}
    of_first = {"unfused"} if EXPERT in layout else set()
    first, second = run_ranks(backends, 2, [settings, settings])
    assert first == [(of_first, 1), (of_first, 0)]
    assert second == [({"unfused"}, 0)] * 2
    assert (tmp_path / FILE).exists()


FLOAT8 = {
    "model.converters": "quantize.grouped_mm.float8",
    "quantize.grouped_mm.float8.fqns": "experts",
    "quantize.grouped_mm.float8.emulate": True,
}
GPT_OSS = {"model.name": "gpt_oss", "model.flavor": "debugmodel"}
SETTLED = {
    "deterministic": ({"debug.deterministic": True}, {"auto"}),
    "in chunks": ({"moe.max_rows_per_chunk": 16}, {"auto"}),
    "quantized": (FLOAT8, {"emulated_float8_rowwise"}),
    "biases": (GPT_OSS, {"auto"}),
    "reference": ({"moe.experts_backend": "reference"}, {"reference"}),
    "batch invariant": ({"debug.batch_invariant": True}, {"reference"}),
    "dense": ({"model.name": "llama3", "model.flavor": "debugmodel"}, set()),
}
"""Changes of settings, and the backends that stay."""


def test_nothing_is_measured_where_nothing_is_open(tmp_path):
    common = SETTINGS | {"job.dump_folder": tmp_path}
    dense = COMMON | {"job.dump_folder": tmp_path}
    runs = [
        (dense if names == set() else common) | changes for changes, names in SETTLED.values()
    ]
    [found] = run_ranks(backends, 1, runs, timeout=120)
    assert dict(zip(SETTLED, found, strict=True)) == {
        name: (names, 0) for name, (_, names) in SETTLED.items()
    }
    [found] = run_ranks(backends, 1, [common], False)
    assert found == [({"auto"}, 0)]  # on a CPU
    assert not (tmp_path / FILE).exists()


def shapes(runs):
    """For each of these settings: the shape that was to be measured, and that of each use of experts."""
    results = []
    for settings in runs:
        asked, used = [], []

        def faster(shape, device, path, asked=asked):
            asked.append(shape)
            return "unfused"

        def look(experts, args, used=used):
            x, counts, *others = args
            scores, order = (*others, None)[:2]
            e, _, hidden, dim = local_part(experts.w13).shape
            assert x.shape[1] == dim
            used.append((dim, hidden, e, int(counts.sum()), scores is not None, order is not None))

        with patch.object(kernel_choice, "can_fuse", lambda *args: True):
            with patch.object(kernel_choice, "faster", faster):
                trainer = build(settings, Trainer)
        for experts in experts_of(trainer):
            experts.register_forward_pre_hook(look)
        trainer.run()
        results.append((asked, used))
    return results


BEFORE = {"model.overrides.moe.score_before_experts": "true"}
NO_SP = {"parallelism.no_enable_sequence_parallel": True}
LAYOUTS = {
    1: {"one rank": {"training.local_batch_size": 3}, "scores before experts": BEFORE},
    2: {
        "ep2": {EXPERT: 2, "training.local_batch_size": 2},
        "ep2, scores before experts": {EXPERT: 2} | BEFORE,
        "tp2": {TENSOR: 2},
        "tp2 ep2": {TENSOR: 2, EXPERT: 2},
        "tp2 ep2, no sp": {TENSOR: 2, EXPERT: 2} | NO_SP,
        "cp2": {CONTEXT: 2},
        "cp2 ep2": {CONTEXT: 2, EXPERT: 2},
        "pp2": PP2 | {"training.local_batch_size": 4, "parallelism.pipeline_parallel_microbatch_size": 2},
    },
    4: {
        "tp2 ep2 etp2": {TENSOR: 2, EXPERT: 2, "parallelism.expert_tensor_parallel_degree": 2},
        "fsdp2 x tp2 ep4": {TENSOR: 2, EXPERT: 4},
        "pp2 ep2": PP2 | {EXPERT: 2, "training.local_batch_size": 2},
    },
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_what_is_measured_is_what_experts_get_on_average(world_size, tmp_path):
    layouts = LAYOUTS[world_size]
    common = SETTINGS | {"job.dump_folder": tmp_path, "debug.moe_force_load_balance": True}
    ranks = run_ranks(shapes, world_size, [common | layout for layout in layouts.values()], timeout=180)
    for name, of_ranks in zip(layouts, zip(*ranks, strict=True), strict=True):
        asked = [shape for shapes, _ in of_ranks for shape in shapes]
        used = [use for _, uses in of_ranks for use in uses]
        assert len(asked) == 1 and of_ranks[0][0], f"{name}: rank 0 alone asks"
        [shape] = asked
        assert isinstance(shape, Shape)
        rows = shape.num_tokens * shape.top_k
        expected = (shape.dim, shape.hidden_dim, shape.num_experts, rows, shape.weighted, shape.gathered)
        assert set(used) == {expected}, name
