"""Which checkpoints are kept, found and refused; what is in them, whenever they are written."""

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchtitan.checkpoint import storage, writer
from torchtitan.checkpoint.find import find_checkpoint, read_progress
from torchtitan.checkpoint.manager import CheckpointManager, NonFiniteState, find_altered
from torchtitan.checkpoint.storage import saved_steps
from torchtitan.checkpoint.writer import CheckpointFailed, on_all_ranks
from torchtitan.config.faults import ConfigError
from torchtitan.config.schema import Checkpoint, Optimizer
from torchtitan.distributed.launch import RankFailure, run_ranks
from torchtitan.optim.optimizer import build_optimizer, state_by_name

ENABLED = Checkpoint(enable=True)
ASSETS = Path("tests/assets/tokenizer")


def manager(folder, value, **options):
    """A manager of one weight and its moments, all of them `value`."""
    model = nn.Linear(2, 2, bias=False)
    state = state_by_name(build_optimizer(model.named_parameters(), Optimizer()))
    with torch.no_grad():
        for tensor in (model.weight, state["weight"]["exp_avg"]):
            tensor.fill_(value)
    return CheckpointManager(Checkpoint(enable=True, **options), folder, model.state_dict, state)


def values(m):
    return m.model_state()["weight"].mean().item(), m.optimizer_state["weight"]["exp_avg"].mean().item()


def save(folder, steps, last=None, **options):
    for step in steps:
        m = manager(folder, float(step), **options)
        m.save(step, {"seed": 1}, last=step == last)


def load(folder, checkpoint, **options):
    m = manager(folder, 0.0, **options)
    m.load(checkpoint)
    return values(m)


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    run_ranks(save, 1, tmp_path, [2, 4, 10])
    folder = tmp_path / "checkpoint"
    (folder / "step-30.tmp").mkdir()  # an interrupted save
    assert saved_steps(folder) == [2, 4, 10]
    newest = find_checkpoint(ENABLED, tmp_path, ASSETS)
    assert newest == folder / "step-10"
    assert read_progress(newest) == {"seed": 1, "step": 10, "model_only": False}
    assert run_ranks(load, 1, tmp_path, newest) == [(10.0, 10.0)]
    assert find_checkpoint(Checkpoint(enable=True, load_step=4), tmp_path, ASSETS) == folder / "step-4"
    assert find_checkpoint(Checkpoint(enable=False), tmp_path, ASSETS) is None


def test_a_missing_step_is_refused_with_the_nearest(tmp_path):
    run_ranks(save, 1, tmp_path, [2, 4])
    with pytest.raises(ConfigError, match=r"load_step = 5: no such checkpoint.*Nearest: 2, 4"):
        find_checkpoint(Checkpoint(enable=True, load_step=5), tmp_path, ASSETS)


def test_an_initial_load_path_is_used_until_the_run_has_its_own(tmp_path):
    run_ranks(save, 1, tmp_path / "first", [3])
    source = tmp_path / "first" / "checkpoint" / "step-3"
    config = Checkpoint(enable=True, initial_load_path=str(source))
    assert find_checkpoint(config, tmp_path / "second", ASSETS) == source
    assert run_ranks(load, 1, tmp_path / "second", source) == [(3.0, 0.0)]  # the model only
    run_ranks(save, 1, tmp_path / "second", [1])
    assert find_checkpoint(config, tmp_path / "second", ASSETS).name == "step-1"
    broken = Checkpoint(enable=True, initial_load_path=str(tmp_path))
    with pytest.raises(ConfigError, match="not a whole checkpoint: manifest.json is missing"):
        find_checkpoint(broken, tmp_path / "third", ASSETS)


@pytest.mark.parametrize(("keep", "left"), [(2, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_old_checkpoints_are_removed(tmp_path, keep, left):
    save_all = {"keep_latest_k": keep}
    run_ranks(save_with, 1, tmp_path, [1, 2, 3, 4, 5], save_all)
    assert saved_steps(tmp_path / "checkpoint") == left


def save_with(folder, steps, options):
    save(folder, steps, **options)


def save_last(folder):
    m = manager(folder, 7.0, export_dtype="bfloat16")
    weights = m.model_state()
    m.model_state = lambda: weights | {"expert_bias": torch.full([2], 0.001)}
    m.save(7, {"seed": 1}, last=True)


def load_excluding(folder, checkpoint):
    return load(folder, checkpoint, exclude_from_loading=["optimizer"])


def test_the_last_save_holds_the_weights_alone(tmp_path):
    run_ranks(save_last, 1, tmp_path)
    last = tmp_path / "checkpoint" / "step-7"
    assert read_progress(last)["model_only"]
    assert run_ranks(load, 1, tmp_path, last) == [(7.0, 0.0)]
    saved = FileSystemReader(last).read_metadata().state_dict_metadata
    dtypes = {name: tensor.properties.dtype for name, tensor in saved.items()}
    # In bfloat16 a bias would no longer move by small steps.
    assert dtypes == {"model.weight": torch.bfloat16, "model.expert_bias": torch.float32}


def test_the_optimizer_can_be_excluded(tmp_path):
    run_ranks(save, 1, tmp_path, [2])
    newest = find_checkpoint(ENABLED, tmp_path, ASSETS)
    assert run_ranks(load_excluding, 1, tmp_path, newest) == [(2.0, 0.0)]


@pytest.mark.parametrize(
    ("step", "last", "options", "expected"),
    [
        (1, False, {}, False),
        (1, False, {"enable_first_step_checkpoint": True}, True),
        (500, False, {}, True),
        (7, True, {}, True),
        (500, True, {"load_only": True}, False),
        (500, True, {"enable": False}, False),
    ],
)
def test_when_a_checkpoint_is_saved(step, last, options, expected):
    config = Checkpoint(**({"enable": True} | options))
    assert CheckpointManager(config, Path(), dict, {}).wants_save(step, last) is expected


def sharded_manager(folder, **options):
    """Weights of three kinds, spread over all ranks: split unevenly, whole, and integers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {
        "split": distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)]),
        "whole": torch.arange(4.0),
        "counts": torch.arange(3),
    }
    moments = {"split": {"exp_avg": tensors["split"] * 2, "step": torch.tensor(1.0)}}
    return CheckpointManager(
        Checkpoint(enable=True, **options), folder, lambda: tensors, moments, origin={"layout": {"dp": 1}}
    )


@torch.no_grad()
def change(m):
    for tensor in (*m.model_state().values(), m.optimizer_state["split"]["exp_avg"]):
        tensor *= 0


def sums(m):
    tensors = m.model_state()
    weights = [tensors["split"].full_tensor(), tensors["whole"], tensors["counts"]]
    return [t.sum().item() for t in (*weights, m.optimizer_state["split"]["exp_avg"].full_tensor())]


SUMS = [105, 6, 3, 210]


def save_while_training_goes_on(folder):
    """Saves three times; the second is held up until the weights have changed."""
    m = sharded_manager(folder, async_mode="async")
    m.save(1, {})
    m.writer.finish()
    buffers = staged_at(m)
    go_on, dcp_save = threading.Event(), writer.dcp.save

    def slow_save(*args, **kwargs):
        assert go_on.wait(30)
        return dcp_save(*args, **kwargs)

    writer.dcp.save = slow_save
    m.save(2, {})
    change(m)
    unfinished = (m.folder / "step-2").exists()
    go_on.set()
    m.save(3, {})  # waits for the one before
    published = (m.folder / "step-2").exists()
    m.writer.finish()
    return unfinished, published, buffers == staged_at(m)


def staged_at(m):
    """Where in host memory the copies are."""
    mapping = m.writer._stager._cached_storage_mapping
    return {storage.data_ptr() for storage in mapping.values()}


def load_sharded(folder, step):
    m = sharded_manager(folder)
    change(m)
    checkpoint = m.folder / f"step-{step}"
    altered = find_altered(checkpoint)
    m.load(checkpoint)
    return altered, sums(m)


@pytest.mark.parametrize("world_size", [1, 3])
def test_training_goes_on_while_a_copy_is_written(tmp_path, world_size):
    ranks = run_ranks(save_while_training_goes_on, world_size, tmp_path)
    assert ranks == [(False, True, True)] * world_size
    assert run_ranks(load_sharded, 2, tmp_path, 2) == [("", SUMS)] * 2
    assert run_ranks(load_sharded, 1, tmp_path, 3) == [("", [0, 0, 0, 0])]
    origin = storage.read_manifest(tmp_path / "checkpoint" / "step-2")["origin"]
    assert origin == {"torch": torch.__version__, "layout": {"dp": 1}}


def fail_in_background(folder, ranks):
    """A disk that is full on some ranks, once."""
    m = sharded_manager(folder, async_mode="async")
    m.save(1, {})
    m.writer.finish()
    sync = os.fsync
    if dist.get_rank() in ranks:
        os.fsync = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    m.save(2, {})
    try:
        while True:
            m.writer.raise_failure()
    except CheckpointFailed as error:
        told = str(error)
    os.fsync = sync
    dist.barrier()  # rank 0 may be removing what was written
    left = sorted(path.name for path in (folder / "checkpoint").iterdir())
    m.save(3, {})  # nothing stands in the way
    m.writer.finish()
    return told, left


@pytest.mark.parametrize(
    "ranks, named", [((0,), "rank 0"), ((1,), "rank 1"), ((0, 1), "rank 0 and 1 more")]
)
def test_a_save_that_fails_in_the_background_is_told_to_all_in_one_line(tmp_path, ranks, named):
    told = f"OSError: [Errno 28] No space left on device, on {named}"
    assert run_ranks(fail_in_background, 2, tmp_path, ranks) == [(told, ["step-1"])] * 2
    assert saved_steps(tmp_path / "checkpoint") == [1, 3]


def fail_together(words):
    def work():
        if word := words[dist.get_rank()]:
            raise ValueError(word)

    try:
        on_all_ranks(work)
    except CheckpointFailed as error:
        return str(error)


@pytest.mark.parametrize(
    "words, told",
    [
        (["", "a", ""], "rank 1: ValueError: a"),
        (["a", "b", "a"], "rank 0 and 1 more: ValueError: a; rank 1: ValueError: b"),
        (["a", "a", "a"], "ValueError: a"),
    ],
)
def test_an_error_of_several_ranks_is_told_once(words, told):
    assert run_ranks(fail_together, 3, words) == [told] * 3


def save_poisoned(folder, rank, name, value):
    m = sharded_manager(folder)
    m.save(1, {})
    tensors = m.model_state() | {"moment": m.optimizer_state["split"]["exp_avg"]}
    if dist.get_rank() == rank:
        local = tensors[name].to_local() if hasattr(tensors[name], "to_local") else tensors[name]
        local.view(-1)[-1] = float(value)
    try:
        m.save(2, {})
    except NonFiniteState as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("rank", "name", "value", "named"),
    [
        (0, "split", "nan", "model.split"),
        (1, "moment", "inf", "optimizer.split.exp_avg"),
        (1, "whole", "-inf", "model.whole"),
    ],
)
def test_nothing_that_is_not_finite_is_saved(tmp_path, rank, name, value, named):
    told = run_ranks(save_poisoned, 2, tmp_path, rank, name, value)
    assert told == [f"step 2 is not saved: {named} not finite"] * 2
    assert saved_steps(tmp_path / "checkpoint") == [1]


def altered_and_unfit(folder, checkpoint):
    told = find_altered(checkpoint)
    m = CheckpointManager(ENABLED, folder, lambda: {"weight": torch.zeros(3, 2)}, {})
    try:
        m.load(checkpoint)
    except CheckpointFailed as error:
        return told, str(error).split(":")[0]
    return told, ""


def test_altered_files_and_other_models_are_told_to_all_ranks(tmp_path):
    run_ranks(save, 1, tmp_path, [2])
    checkpoint = tmp_path / "checkpoint" / "step-2"
    told = ("", f"{checkpoint} does not fit this model")
    assert run_ranks(altered_and_unfit, 2, tmp_path, checkpoint) == [told] * 2
    data = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    data[-1] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(data)
    [(altered, _), (same, _)] = run_ranks(altered_and_unfit, 2, tmp_path, checkpoint)
    assert altered == same == "__0_0.distcp does not match its checksum"


def save_seed(folder):
    manager(folder, 3.0, create_seed_checkpoint=True).save_seed({"seed": 1})


def test_a_seed_checkpoint_is_weights_for_a_new_run(tmp_path):
    run_ranks(save_seed, 1, tmp_path)
    seed = find_checkpoint(ENABLED, tmp_path, ASSETS)
    assert read_progress(seed) == {"seed": 1, "model_only": True, "step": 0}
    assert run_ranks(load, 1, tmp_path, seed) == [(3.0, 0.0)]
    with pytest.raises(ConfigError, match="is what a run begins with, and there is .*step-0"):
        find_checkpoint(Checkpoint(enable=True, create_seed_checkpoint=True), tmp_path, ASSETS)


def see(checkpoints):
    with pytest.raises(RuntimeError, match="the ranks see different checkpoints: .*step-2.*None"):
        find_altered(checkpoints[dist.get_rank()])


def test_ranks_that_see_different_folders_do_not_start(tmp_path):
    run_ranks(see, 2, [tmp_path / "step-2", None])


def load_with_a_bias(folder, checkpoint, initial):
    """Into a model that has state of training besides."""
    m = manager(folder if initial else checkpoint.parents[1], 0.0)
    weights = m.model_state()
    m.model_state = lambda: weights | {"expert_bias": torch.ones(2)}
    m.load(checkpoint)
    return m.model_state()["expert_bias"].tolist(), values(m)[0]


def test_state_of_training_may_begin_anew_with_loaded_weights(tmp_path):
    run_ranks(save, 1, tmp_path / "first", [3])
    checkpoint = tmp_path / "first" / "checkpoint" / "step-3"
    assert run_ranks(load_with_a_bias, 1, tmp_path / "second", checkpoint, True) == [([1.0, 1.0], 3.0)]
    with pytest.raises(RankFailure, match="step-3 has no model.expert_bias"):
        run_ranks(load_with_a_bias, 1, tmp_path, checkpoint, False)  # a resume needs all
