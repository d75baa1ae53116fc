"""Runs in low precision: their losses, and checkpoints that know nothing of it."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed_tests.test_training import COMMON, Trainer, build, messages, records, run
from torchtitan.checkpoint.hf import load_pretrained
from torchtitan.distributed.launch import run_ranks
from torchtitan.logging import logger

FLOAT8 = "quantize.linear.float8"
CONVERTED = {"model.converters": "float8", f"{FLOAT8}.emulate": True}
GATHERED = CONVERTED | {f"{FLOAT8}.enable_fsdp_float8_all_gather": True, "training.local_batch_size": 6}
PRECOMPUTED = GATHERED | {f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp": True}
SAVED = {"checkpoint.enable": True, "checkpoint.no_last_save_model_only": True}
TP2 = {"parallelism.tensor_parallel_degree": 2}


def losses(records):
    return [record["loss"] for record in records.values()]


class LookingTrainer(Trainer):
    def run(self):
        super().run()
        named = self.model.named_parameters()
        weights = [weight._local_tensor for name, weight in named if "attention.w" in name]
        self.scales = [weight._precomputed_scale for weight in weights]


def scales(settings):
    trainer = build(settings, LookingTrainer)
    trainer.run()
    return trainer.scales


def trees(settings):
    """Module trees that a run of one step prints."""
    logger.setLevel("INFO")
    settings = COMMON | CONVERTED | {"training.local_batch_size": 12, "training.steps": 1} | settings
    return [line for line in messages(settings) if "(tok_embeddings)" in line]


def test_the_converted_model_is_printed_where_asked_for(tmp_path):
    settings = {"job.dump_folder": tmp_path}
    [[tree]] = run_ranks(trees, 1, settings | {"model.print_after_conversion": True})
    assert tree.count("(wq): Float8Linear(") == 2
    assert run_ranks(trees, 1, settings) == [[]]


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """A run with weights gathered as float8, saved by the way."""
    folder = tmp_path_factory.mktemp("gathered")
    return folder, *run(folder, 2, **GATHERED, **SAVED, **{"checkpoint.interval": 3})


def test_scales_computed_for_all_weights_are_the_same(gathered, tmp_path):
    settings = COMMON | PRECOMPUTED | {"job.dump_folder": tmp_path}
    [found, _] = run_ranks(scales, 2, settings, timeout=120)
    assert len(found) == 8 and all(scale is not None for scale in found)
    assert losses(records(tmp_path)) == losses(gathered[1])


def test_checkpoints_have_plain_weights(gathered):
    folder, *_ = gathered
    saved = FileSystemReader(folder / "checkpoint" / "step-3").read_metadata().state_dict_metadata
    dtypes = {name: tensor.properties.dtype for name, tensor in saved.items() if name.startswith("model.")}
    assert len(dtypes) == 2 * 9 + 3 and set(dtypes.values()) == {torch.float32}


def test_a_run_goes_on_as_if_it_had_not_stopped(gathered, tmp_path):
    folder, expected, _, final, _ = gathered
    there = SAVED | {"checkpoint.load_step": 3}
    (tmp_path / "checkpoint").symlink_to(folder / "checkpoint")
    ours, _, weights, _ = run(tmp_path, 2, **GATHERED, **there, **{"checkpoint.load_only": True})
    assert losses(ours) == losses(expected)[3:]
    assert all(torch.equal(weights[name], weight) for name, weight in final.items())


@pytest.mark.parametrize("converted", [CONVERTED, {}], ids=["float8", "fp32"])
def test_a_checkpoint_goes_on_in_another_layout_and_precision(gathered, tmp_path, converted):
    folder, expected, *_ = gathered
    there = SAVED | {"checkpoint.load_step": 3, "checkpoint.load_only": True}
    (tmp_path / "checkpoint").symlink_to(folder / "checkpoint")
    more = {"training.local_batch_size": 12}
    ours, *_ = run(tmp_path, 2, **converted, **TP2, **there, **more)
    assert losses(ours) == pytest.approx(losses(expected)[3:], rel=2e-3)


def test_hugging_face_files_have_plain_weights(tmp_path):
    export = {"checkpoint.enable": True, "checkpoint.last_save_in_hf": True}
    _, _, final, _ = run(tmp_path, 2, **GATHERED, **export, **{"training.steps": 2})
    model = load_pretrained(tmp_path / "checkpoint" / "step-2")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, final[name]), name


UPSTREAM = Path(__file__).parents[3] / "shared" / "upstream_toml"
SMALLER = {
    "model.flavor": "debugmodel",
    "model.hf_assets_path": "tests/assets/tokenizer",
    "training.dataset": "c4_test",
    "parallelism.no_enable_async_tensor_parallel": True,
    "compile.no_enable": True,
    f"{FLOAT8}.emulate": True,
    **TP2,
}


@pytest.mark.parametrize("file", list(UPSTREAM.glob("llama3_405b.toml")), ids=lambda file: file.stem)
def test_upstreams_file_runs(file, tmp_path):
    """With what it says of float8: gathered, scales computed for all weights, the output filtered."""
    found, *_ = run(tmp_path, 4, **{"job.config_file": file}, **SMALLER)
    assert len(found) == 6 and all(7 < loss < 9 for loss in losses(found))


BAND = {
    "training.steps": 60,
    "optimizer.lr": 4e-3,
    "lr_scheduler.warmup_steps": 10,
    "training.local_batch_size": 12,
    "model.overrides.dim": 64,
    "model.overrides.ffn_dim": 128,
}


def final_loss(folder, **changes):
    """The mean of the last ten steps: single ones are noisier than low precision makes them."""
    found, *_ = run(folder, **BAND, **changes)
    return sum(losses(found)[-10:]) / 10


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory):
    return final_loss(tmp_path_factory.mktemp("fp32"))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_losses_stay_in_the_band_of_fp32(in_fp32, tmp_path, recipe):
    assert in_fp32 < 6.6  # it has learnt: the first steps are at 8.1
    ours = final_loss(tmp_path, **CONVERTED, **{f"{FLOAT8}.recipe_name": recipe})
    assert ours == pytest.approx(in_fp32, rel=5e-3)
    assert ours != in_fp32
