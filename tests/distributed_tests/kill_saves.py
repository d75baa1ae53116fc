"""Kills a rank with SIGKILL at random points of saves, and looks whether the next start goes on.

`python -m tests.distributed_tests.kill_saves [--points 50] [--ranks 2] [--seed 0] [--async]`
"""

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.distributed_tests.test_training import CHECKPOINTS, COMMON, CPU, records
from torchtitan.checkpoint import storage
from torchtitan.config.manager import load_config
from torchtitan.distributed.comm import World
from torchtitan.distributed.launch import RankFailure, run_ranks
from torchtitan.observability.watchdog import Watchdog
from torchtitan.preflight import prepare, prepare_again
from torchtitan.trainer import Trainer

SETTINGS = COMMON | CHECKPOINTS | {
    "model.overrides.n_layers": 1,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 2,
    "checkpoint.load_step": -1,
    "training.steps": 10_000,
    "lr_scheduler.total_steps": 10_000,
}


@dataclass(frozen=True)
class Kill:
    """Which rank dies, in the which-th save of its run, how many seconds into it."""

    rank: int
    save: int
    after: float


def train(settings, kill, until):
    """Train on this rank from what is there; (step it began at, seconds of each save)."""
    world = World.from_environment()
    argv = [f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items()]
    config = load_config(argv)
    setup = prepare_again(prepare(config, world.size, CPU), world.size, CPU)
    trainer = Trainer(setup, world, CPU, Watchdog(World(), 0, ""))
    began_at, seconds = trainer.step, []
    save = trainer.checkpoints.save

    def timed_save(*args, **kwargs):
        start = time.perf_counter()
        if kill is not None and (kill.rank, kill.save) == (world.rank, len(seconds)):
            threading.Timer(kill.after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        save(*args, **kwargs)
        trainer.checkpoints.writer.finish()
        seconds.append(time.perf_counter() - start)
        trainer.stopping |= trainer.step - began_at >= until

    trainer.checkpoints.save = timed_save
    trainer.run()
    return began_at, seconds


def found_on_disk(folder: Path, step: int) -> str:
    """How far the save of `step` had come when a rank was killed."""
    if (folder / f"step-{step}").exists():
        return "published"
    temporary = storage.temporary_path(folder, step)
    if (temporary / "manifest.json").exists():
        return "manifest written, not published"
    if (temporary / ".metadata").exists():
        return "data complete, no manifest"
    if any(temporary.glob("*")):
        return "data being written"
    return "before the first file"


def kill_saves(folder: Path, points: int, ranks: int, seed: int, mode: str = "disabled") -> Counter:
    """Counts of where the kills fell; AssertionError where a start did not go on as it should."""
    draw = random.Random(seed)
    settings = SETTINGS | {"job.dump_folder": folder, "checkpoint.async_mode": mode}
    checkpoints = folder / "checkpoint"
    [(began_at, seconds), *_] = run_ranks(train, ranks, settings, None, 3, timeout=120)
    duration = sorted(seconds)[len(seconds) // 2]
    fallen, newest = Counter(), max(storage.saved_steps(checkpoints))
    for point in range(points):
        kill = Kill(draw.randrange(ranks), draw.randrange(2), draw.uniform(0, 1.2) * duration)
        expected = newest
        try:
            run_ranks(train, ranks, settings, kill, 4, timeout=120)
            fallen["after the run"] += 1
        except RankFailure as failure:
            assert f"rank {kill.rank} was ended by SIGKILL" in str(failure), failure
            tried = max(storage.step_of(p) for p in storage.candidates(checkpoints))
            tried = max([tried, *(int(p.name[5:-4]) for p in checkpoints.glob("step-*[0-9].tmp"))])
            fallen[found_on_disk(checkpoints, tried)] += 1
        newest = max(storage.saved_steps(checkpoints))
        assert newest >= expected + kill.save, (point, kill, newest, expected)
        trained = max(records(folder))
        assert newest >= trained - 1, f"point {point}: step {trained} was trained, {newest} is found"
    [(began_at, _), *_] = run_ranks(train, ranks, settings, None, 1, timeout=120)
    assert began_at == newest
    return fallen


def uninterrupted(folder: Path, ranks: int, steps: int) -> dict[int, float]:
    """Losses of a run that nobody disturbs."""
    settings = SETTINGS | {"job.dump_folder": folder, "training.steps": steps}
    settings |= {"checkpoint.interval": steps}
    run_ranks(train, ranks, settings, None, steps + 1, timeout=600)
    return losses(folder)


def losses(folder: Path) -> dict[int, float]:
    return {step: record["loss"] for step, record in records(folder).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async", action="store_true", dest="asynchronous")
    args = parser.parse_args()
    start = time.perf_counter()
    mode = "async" if args.asynchronous else "disabled"
    with tempfile.TemporaryDirectory(prefix="kill_saves_") as name:
        folder = Path(name)
        fallen = kill_saves(folder / "killed", args.points, args.ranks, args.seed, mode)
        ours = losses(folder / "killed")
        same = ours == uninterrupted(folder / "whole", args.ranks, max(ours))
    print(f"{args.points} kills of {args.ranks} ranks, {mode}: {time.perf_counter() - start:.0f} s")
    for where, count in sorted(fallen.items()):
        print(f"{count:4}  {where}")
    print(f"{len(ours)} steps, losses {'equal' if same else 'DIFFERENT FROM'} an uninterrupted run's")


if __name__ == "__main__":
    main()
