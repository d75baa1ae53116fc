"""TensorBoard and Weights & Biases: what they are given, and what happens without them."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from torchtitan.config.faults import ConfigError
from torchtitan.config.schema import Metrics
from torchtitan.observability.sinks import check_sinks, open_sinks

RECORDS = [{"step": 1, "loss": 8.0, "lr": 0.5}, {"step": 5, "loss": float("inf"), "lr": 1.0}]


RUN = {"training": {"steps": 7}}


def write_all(config: Metrics, folder, rank: int = 0) -> None:
    for sink in open_sinks(config, folder, RUN, rank=rank, step=0):
        for record in RECORDS:
            sink.write(record)
        sink.close()


def test_tensorboard_events_can_be_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_all(Metrics(enable_tensorboard=True, save_tb_folder="events"), tmp_path)
    (folder,) = (tmp_path / "events").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 8.0), (5, float("inf"))]


def test_other_ranks_write_nothing_unless_asked(tmp_path):
    write_all(Metrics(enable_tensorboard=True), tmp_path, rank=1)
    assert not list(tmp_path.iterdir())


class FakeWandb:
    """Stands in for the package, which the tests do not install."""

    __spec__ = SimpleNamespace(name="wandb")

    def __init__(self):
        self.calls = []

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        return self

    def __getattr__(self, method):
        return lambda *args, **named: self.calls.append((method, *args, *named.values()))


def test_weights_and_biases_gets_the_config_and_records_by_our_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    write_all(Metrics(enable_wandb=True, enable_tensorboard=True), tmp_path)
    assert wandb.calls == [
        ("init", {"dir": tmp_path / "tb", "config": RUN}),
        ("define_metric", "*", "step"),
        *(("log", record) for record in RECORDS),
        ("finish",),
    ]
    assert len(list((tmp_path / "tb").iterdir())) == 1  # TensorBoard's, at the same time


def test_weights_and_biases_of_any_rank_needs_no_file_of_another(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    write_all(Metrics(enable_wandb=True, save_for_all_ranks=True), tmp_path, rank=1)
    assert wandb.calls[0] == ("init", {"dir": tmp_path / "tb" / "rank_1", "config": RUN})


def test_a_sink_whose_package_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    check_sinks(Metrics())
    with pytest.raises(ConfigError) as error:
        write_all(Metrics(enable_wandb=True, enable_tensorboard=True), tmp_path)
    assert [fault.setting for fault in error.value.faults] == [
        "metrics.enable_tensorboard",
        "metrics.enable_wandb",
    ]
    assert "pip install wandb" in str(error.value)


def test_metrics_load_neither_package_until_asked():
    code = (
        "import sys, torchtitan.observability.metrics, torchtitan.observability.profiling;"
        "print(sorted({'tensorboard', 'wandb'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
