"""A run told to stop, in any phase and on any rank, ends on all of them with a whole checkpoint."""

import os
import signal

import pytest

from tests.distributed_tests.test_training import CHECKPOINTS, COMMON, CPU, VALIDATION, records
from torchtitan.checkpoint import storage
from torchtitan.checkpoint.find import read_progress
from torchtitan.config.manager import load_config
from torchtitan.distributed.comm import World
from torchtitan.distributed.launch import run_ranks
from torchtitan.observability.watchdog import Watchdog
from torchtitan.preemption import StopRequest
from torchtitan.preflight import prepare, prepare_again
from torchtitan.trainer import Trainer

SETTINGS = COMMON | CHECKPOINTS | VALIDATION | {
    "checkpoint.interval": 4,
    "model.overrides.n_layers": 1,
    "training.steps": 8,
    "validation.steps": 1,
    "validation.seq_len": 32,
}


class InterruptedTrainer(Trainer):
    """Sends its own rank a signal at one point of the run."""

    interrupt = staticmethod(lambda phase, step: None)

    def _build_loader(self, *args):
        self.interrupt("load", 0)
        return super()._build_loader(*args)

    def _forward_backward(self, *args):
        self.interrupt("step", self.step)
        return super()._forward_backward(*args)

    def _validation_batches(self, *args):
        self.interrupt("validation", self.step)
        return super()._validation_batches(*args)

    def _progress(self):
        self.interrupt("save", self.step)
        return super()._progress()


def train(settings, phase="", step=0, rank=0, number=0, max_run_seconds=None):
    """Returns (whether all was done, the step it ended at)."""
    world = World.from_environment()
    argv = [f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items()]
    stop = StopRequest(max_run_seconds)
    stop.listen()

    def interrupt(*where):
        if where == (phase, step) and world.rank == rank:
            os.kill(os.getpid(), number)

    InterruptedTrainer.interrupt = staticmethod(interrupt)
    setup = prepare_again(prepare(load_config(argv), world.size, CPU), world.size, CPU)
    trainer = InterruptedTrainer(setup, world, CPU, Watchdog(World(), 0, ""), stop)
    return trainer.run(), trainer.step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(train, 2, SETTINGS | {"job.dump_folder": folder})
    return records(folder)


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POINTS = {
    # phase, step, the step after which the run ends
    "while it loads": ("load", 0, 0),
    "in the first step": ("step", 1, 1),  # validation follows, and ends with a look around
    "in a step": ("step", 2, 3),
    "in validation": ("validation", 3, 3),
    "in a save": ("save", 4, 4),
    "in the last step": ("step", 8, 8),
}


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("name", POINTS)
def test_told_to_stop_at_any_point(whole, tmp_path, name, mode):
    phase, step, last = POINTS[name]
    rank = list(POINTS).index(name) % 2
    number = SIGNALS[(rank + (mode == "async")) % 2]
    settings = SETTINGS | {"job.dump_folder": tmp_path, "checkpoint.async_mode": mode}
    ended = run_ranks(train, 2, settings, phase, step, rank, number)
    assert ended == [(last == 8, last)] * 2
    folder = tmp_path / "checkpoint"
    steps = storage.saved_steps(folder)
    assert not list(folder.glob("*.tmp"))
    assert max(steps, default=0) == last
    if last:
        progress = read_progress(folder / f"step-{last}")
        assert (progress["step"], progress["model_only"]) == (last, False)
    assert run_ranks(train, 2, settings) == [(True, 8)] * 2
    ours = records(tmp_path)
    assert [r["loss"] for r in ours.values()] == [r["loss"] for r in whole.values()]


def test_told_to_stop_while_a_checkpoint_is_loaded(tmp_path):
    settings = SETTINGS | {"job.dump_folder": tmp_path}
    run_ranks(train, 1, settings | {"training.steps": 4})
    assert run_ranks(train, 1, settings, "load", 0, 0, signal.SIGTERM) == [(False, 4)]
    assert storage.saved_steps(tmp_path / "checkpoint") == [4]


def test_the_wall_time_budget_is_a_request_too(tmp_path):
    settings = SETTINGS | {"job.dump_folder": tmp_path, "validation.freq": 100}
    [(done, step)] = run_ranks(train, 1, settings, "", 0, 0, 0, 1e-6)
    assert (done, step) == (False, 0)
    assert not (tmp_path / "checkpoint").exists()


def starts_from(settings):
    world = World.from_environment()
    argv = [f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items()]
    setup = prepare(load_config(argv), world.size, CPU)
    return setup.progress["step"], prepare_again(setup, world.size, CPU).progress["step"]


def test_all_ranks_leave_out_a_checkpoint_with_an_altered_file(tmp_path):
    settings = SETTINGS | {"job.dump_folder": tmp_path, "validation.freq": 100}
    run_ranks(train, 1, settings)
    path = tmp_path / "checkpoint" / "step-8" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run_ranks(starts_from, 2, settings) == [(8, 4)] * 2
