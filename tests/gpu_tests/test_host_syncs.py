"""A training step waits for the GPU once, where it asks whether loss and gradient are finite."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

from torchtitan.config.manager import load_config
from torchtitan.distributed.comm import World, init_process_group
from torchtitan.observability.watchdog import Watchdog
from torchtitan.preflight import prepare
from torchtitan.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 6
RUNS = {
    "dense": ["--model.flavor=debugmodel"],
    "experts": ["--model.name=qwen3", "--model.flavor=debugmodel_moe", "--model.overrides.n_layers=2"],
    "recomputed": [
        *("--model.name=qwen3", "--model.flavor=debugmodel_moe", "--model.overrides.n_layers=2"),
        "--activation_checkpoint.mode=full",
    ],
}


class WatchedTrainer(Trainer):
    """Counts by step, after the first ones, what waits for the GPU."""

    def _train_step(self, batch):
        if self.step <= 3:  # kernels are chosen, and built
            return super()._train_step(batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            super()._train_step(batch)
            torch.cuda.set_sync_debug_mode("default")
        self.waits[self.step] = [
            f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)
        ]


def main(argv):
    """Print the places that waited, by step."""
    device = torch.device("cuda", 0)
    config = load_config(argv)
    init_process_group(config.comm, config.job.dump_folder, device)
    trainer = WatchedTrainer(prepare(config, 1, device), World(), device, Watchdog(World(), 0, ""))
    trainer.waits = {}
    trainer.run()
    print(json.dumps(trainer.waits))


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_once(name, tmp_path):
    argv = [f"--job.dump_folder={tmp_path}", f"--training.steps={STEPS}", "--training.seq_len=512"]
    argv += ["--metrics.log_freq=100", "--training.mixed_precision_param=bfloat16", *RUNS[name]]
    command = [sys.executable, "-m", "tests.gpu_tests.test_host_syncs", *argv]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    waits = json.loads(run.stdout.splitlines()[-1])
    assert len(waits) == STEPS - 3
    assert all(len(places) == 1 and "trainer.py" in places[0] for places in waits.values()), waits


if __name__ == "__main__":
    main(sys.argv[1:])
