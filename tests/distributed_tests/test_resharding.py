"""A checkpoint of any layout goes on in any other as if nothing had happened."""

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor

from tests.distributed_tests.test_training import CHECKPOINTS, COMMON, CPU, Trainer, records
from torchtitan.config.manager import load_config
from torchtitan.distributed.comm import World
from torchtitan.distributed.launch import run_ranks
from torchtitan.observability.watchdog import Watchdog
from torchtitan.preflight import prepare, prepare_again

TP, EP = "parallelism.tensor_parallel_degree", "parallelism.expert_parallel_degree"
LAYOUTS = {
    # ranks, those of them that read different data, degrees
    "one": (1, 1, {}),
    "fsdp2": (2, 2, {}),
    "fsdp3": (3, 3, {}),
    "hsdp2x2": (4, 4, {"parallelism.data_parallel_replicate_degree": 2}),
    "tp2": (2, 1, {TP: 2}),
    "fsdp2 x tp2": (4, 2, {TP: 2}),
    "ep2": (2, 2, {EP: 2}),
    "ep4": (4, 4, {EP: 4}),
    "fsdp2 x tp2, ep4": (4, 2, {TP: 2, EP: 4}),
}
SAVED, STEPS = 2, 4
SETTINGS = COMMON | CHECKPOINTS | {
    "model.name": "qwen3",
    "model.flavor": "debugmodel_moe",
    "model.overrides.n_heads": 4,
    "model.overrides.n_kv_heads": 2,
    "model.overrides.moe.num_experts": 8,
    "model.overrides.moe.top_k": 2,
    "model.overrides.moe.ffn_dim": 16,
    "model.overrides.moe.load_balance_coeff": 1e-2,
    "moe.global_balance_coeff": 1e-2,
    "training.steps": STEPS,
    "checkpoint.interval": SAVED,
    "checkpoint.keep_latest_k": 0,
    "lr_scheduler.total_steps": STEPS,
}


class LookingTrainer(Trainer):
    """Keeps what it has loaded."""

    def run(self):
        self.loaded = state(self)
        return super().run()


def state(trainer):
    """Every logical tensor of model and optimizer, whole."""
    tensors = {f"model.{name}": t for name, t in trainer.model.state_dict().items()}
    for name, moments in trainer.checkpoints.optimizer_state.items():
        tensors |= {f"{key}.{name}": t for key, t in moments.items()}
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors.items()
    }


def train(folder, layout, trainer, changes):
    """Train on this rank from what is in the folder; (state at the start, at the end), from rank 0."""
    world = World.from_environment()
    _, num_readers, degrees = LAYOUTS[layout]
    batch = {"training.local_batch_size": SETTINGS["training.global_batch_size"] // num_readers}
    settings = SETTINGS | degrees | batch | {"job.dump_folder": folder} | changes
    argv = [f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items()]
    setup = prepare_again(prepare(load_config(argv), world.size, CPU), world.size, CPU)
    trainer = trainer(setup, world, CPU, Watchdog(World(), 0, ""))
    trainer.run()
    end = state(trainer)
    return (trainer.loaded, end) if world.rank == 0 else None


def run(folder, layout, trainer=LookingTrainer, **changes):
    return run_ranks(train, LAYOUTS[layout][0], folder, layout, trainer, changes, timeout=120)[0]


def losses(folder):
    return {step: record["loss"] for step, record in records(folder).items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    run(folder, "one")
    return losses(folder)


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory):
    """By layout, the folder of a run that saved its state, and that state."""
    runs = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp("saved")
        _, state = run(folder, layout, **{"training.steps": SAVED})
        assert_same_curve(losses(folder), reference, steps=range(1, SAVED + 1))
        runs[layout] = folder, state
    return runs


def load_each(folders, folder, layout):
    """Go on from the checkpoints of each of `folders`, and write to folder/<layout of that one>."""
    return [
        train(folder / name, layout, LookingTrainer, LOAD | {"checkpoint.folder": saved / "checkpoint"})
        for name, saved in folders.items()
    ]


LOAD = {"checkpoint.load_only": True}


def assert_same_curve(ours, reference, steps):
    assert list(ours) == list(steps)
    for step, loss in ours.items():
        assert loss == pytest.approx(reference[step], rel=1e-6), step


@pytest.mark.parametrize("loaded_on", LAYOUTS)
def test_saved_on_any_layout_it_goes_on(reference, saved, tmp_path, loaded_on):
    """The tensors are those saved, bit for bit, and the next losses are one process's."""
    folders = {name: folder for name, (folder, _) in saved.items()}
    world_size = LAYOUTS[loaded_on][0]
    ranks = run_ranks(load_each, world_size, folders, tmp_path, loaded_on, timeout=170)
    for (saved_on, (_, state)), (loaded, _) in zip(saved.items(), ranks[0], strict=True):
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(loaded[name], tensor), (saved_on, name)
        assert_same_curve(losses(tmp_path / saved_on), reference, steps=range(SAVED + 1, STEPS + 1))


class GradlessTrainer(LookingTrainer):
    """A layer that takes no part in the loss."""

    def _forward_backward(self, *args):
        loss = super()._forward_backward(*args)
        for name, parameter in self.model.named_parameters():
            if name.startswith("layers.1.attention."):
                parameter.grad = None
        return loss


def test_parameters_without_gradients_are_saved_from_the_first_step_on(tmp_path):
    settings = {"checkpoint.enable_first_step_checkpoint": True, "training.steps": 1}
    run(tmp_path, "fsdp2", trainer=GradlessTrainer, **settings)
    reader = FileSystemReader(tmp_path / "checkpoint" / "step-1")
    saved = set(reader.read_metadata().state_dict_metadata)
    names = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    weights = {name for name in names if not name.endswith(("expert_bias", "previous_load"))}
    for name in weights:
        assert {f"optimizer.{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")} <= saved
    gradless = {name for name in weights if name.startswith("layers.1.attention.")}
    assert len(gradless) == 6
    loaded, end = run(tmp_path, "tp2", trainer=GradlessTrainer, **{"training.steps": 2})
    for name in gradless:
        assert not end[f"exp_avg.{name}"].any() and end[f"step.{name}"] == 0
        assert torch.equal(end[f"model.{name}"], loaded[f"model.{name}"])


@pytest.mark.parametrize("layout", ["one", "fsdp2 x tp2, ep4"])
def test_on_the_same_layout_the_bits_are_the_same(tmp_path, layout):
    """Weights, moments, balance biases, the last step's load: of all that makes up the state."""
    _, whole = run(tmp_path / "whole", layout)
    for steps in range(1, STEPS + 1):
        _, ours = run(
            tmp_path / "parts", layout, **{"training.steps": steps, "checkpoint.interval": 1}
        )
    assert any("expert_bias" in name for name in whole)
    assert any("previous_load" in name for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(ours[name], tensor), name
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
