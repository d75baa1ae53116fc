"""What a run reports: the record's fields, the console line, and files across a resume."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from torchtitan.config.schema import Metrics
from torchtitan.logging import logger
from torchtitan.observability.clock import DeviceTimer, StartClock, StepClock
from torchtitan.observability.console import training_line, validation_line
from torchtitan.observability.metrics import MetricsLogger, Workload

CPU = torch.device("cpu")
CONFIG = Metrics(log_freq=5, disable_color_printing=True)
WORKLOAD = Workload(num_steps=20, tokens_per_step=64, flops_per_token=(3e6, 2e6), num_devices=2)
RECORD = {
    "step": 1,
    "loss": 8.1234,
    "grad_norm": 1.2345,
    "memory": 1.5,
    "memory_percent": 1.9,
    "tokens_per_second_per_device": 12345.4,
    "tflops": 1234.564,
    "mfu": 41.5,
}


def make_metrics(folder, config=CONFIG, rank=0, step=0) -> MetricsLogger:
    metrics = MetricsLogger(config, str(folder), WORKLOAD, rank=rank, device=CPU)
    metrics.start(step, run={})
    return metrics


def log(metrics: MetricsLogger, *steps: int, loss: float = 2.5) -> None:
    for step in steps:
        metrics.log(step, loss=loss, grad_norm=1.0, lr=1e-3, n_tokens_seen=60 * step)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_console_line():
    assert training_line(RECORD, 3723.4, color=False) == (
        "step:  1  loss:  8.12340  grad_norm:  1.2345  memory:  1.50GiB(1.90%)  "
        "tps: 12,345  tflops: 1,234.56  mfu: 41.50%  eta: 1:02:03"
    )


def test_console_line_leaves_out_what_is_not_known():
    record = {key: value for key, value in RECORD.items() if key != "mfu"}
    line = training_line({**record, "loss": math.nan, "step": 1000}, None, color=False)
    assert line.startswith("step: 1000  loss:      nan  ") and line.endswith("tflops: 1,234.56")


def test_validation_line():
    record = {
        **RECORD,
        "validation_loss": 3.0,
        "validation_tokens_per_second_per_device": 99.6,
    }
    assert validation_line(record, color=False) == (
        "validate step:  1  loss:  3.00000  memory:  1.50GiB(1.90%)  tps: 100"
    )


@pytest.mark.parametrize(
    ("terminal", "forced", "disabled", "colored"),
    [(False, False, False, False), (True, False, False, True), (False, True, False, True), (True, True, True, False)],
)
def test_colors_are_for_terminals(terminal, forced, disabled, colored, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    config = Metrics(disable_color_printing=disabled)
    metrics = MetricsLogger(config, str(tmp_path), WORKLOAD, rank=0, device=CPU)
    assert metrics._color == colored


def test_color_adds_escapes_only():
    line = training_line(RECORD, 1.0, color=True)
    assert line.count("\033[") == 9
    assert "loss:  8.12340" in line


def test_logged_steps_are_the_first_and_every_log_freq(tmp_path):
    metrics = make_metrics(tmp_path)
    assert [step for step in range(1, 12) if metrics.should_log(step)] == [1, 5, 10]


def test_a_record_has_every_field_and_its_figures_fit_together(tmp_path):
    metrics = make_metrics(tmp_path)
    log(metrics, 1)
    metrics.log(5, loss=2.0, grad_norm=0.5, lr=2e-3, n_tokens_seen=300, router_entropy=0.25)
    metrics.close()
    _, record = lines(tmp_path)
    assert set(record) == {
        "step", "loss", "grad_norm", "lr", "n_tokens_seen", "seconds_per_step",
        "data_seconds_per_step", "forward_backward_seconds_per_step", "tokens_per_second", "tokens_per_second_per_device", "tflops",
        "memory", "memory_percent", "router_entropy", "time",
    }  # fmt: skip
    expected = {"step": 5, "loss": 2.0, "grad_norm": 0.5, "lr": 2e-3, "n_tokens_seen": 300}
    assert {key: record[key] for key in expected} == expected
    assert record["tokens_per_second"] * record["seconds_per_step"] == pytest.approx(64)
    assert record["tokens_per_second_per_device"] == record["tokens_per_second"] / 2
    assert record["tflops"] == pytest.approx(record["tokens_per_second_per_device"] * 3e6 / 1e12)
    assert 0.05 < record["memory"] < 100 and 0 < record["memory_percent"] < 100


def test_only_rank_0_writes_the_file_and_every_rank_speaks(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger="torchtitan")
    log(make_metrics(tmp_path, rank=1), 1)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert "step:  1  loss:  2.50000" in caplog.text


def test_what_is_not_finite_is_valid_json_that_float_reads(tmp_path):
    metrics = make_metrics(tmp_path)
    values = [math.nan, math.inf, -math.inf]
    for step, loss in enumerate(values, start=1):
        log(metrics, step, loss=loss)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    got = [json.loads(line, parse_constant=refuse)["loss"] for line in text.splitlines()]
    assert got == ["NaN", "Infinity", "-Infinity"]
    assert str(list(map(float, got))) == str(values)


def test_validation_is_reported_beside_training(tmp_path):
    metrics = make_metrics(tmp_path)
    log(metrics, 1)
    with metrics.paused():
        metrics.log_validation(1, loss=3.5, num_tokens=128)
    train, validation = lines(tmp_path)
    assert (validation["step"], validation["validation_loss"]) == (1, 3.5)
    seconds = validation["validation_seconds"]
    assert validation["validation_tokens_per_second"] * seconds == pytest.approx(128)
    assert "loss" not in validation and "validation_loss" not in train


@pytest.mark.parametrize("torn", ["", '{"step": 15, "lo', '{"step": 10'])
def test_a_resume_has_each_step_once_in_order(tmp_path, torn):
    metrics = make_metrics(tmp_path)
    log(metrics, 1, 5, 10, 15, loss=1.0)
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    log(make_metrics(tmp_path, step=10), 15, 20, loss=2.0)
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == [
        (1, 1.0), (5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0),
    ]  # fmt: skip


def test_a_resume_completes_a_last_line_without_newline(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}')
    log(make_metrics(tmp_path, step=5), 10)
    assert [r["step"] for r in lines(tmp_path)] == [5, 10]


def test_a_new_run_puts_the_metrics_of_another_aside(tmp_path):
    log(make_metrics(tmp_path), 1, 5)
    log(make_metrics(tmp_path), 1)
    assert [r["step"] for r in lines(tmp_path)] == [1]
    (aside,) = tmp_path.glob("metrics.2*.jsonl")
    assert len(aside.read_text().splitlines()) == 2


def test_time_paused_or_before_a_resume_is_not_training_time():
    seconds = iter([0.0, 1.0, 3.0, 10.0, 20.0, 50.0, 60.0, 70.0, 90.0]).__next__
    clock = StepClock(step=100, now=seconds)  # at 0 s
    with clock.loading_data():  # 1 s to 3 s
        pass
    lap = clock.lap(102)  # at 10 s
    assert (lap.num_steps, lap.seconds, lap.data_seconds) == (2, 10.0, 2.0)
    assert lap.wall_seconds_per_step is None
    with clock.paused():  # 20 s to 50 s
        pass
    lap = clock.lap(107)  # at 60 s
    assert (lap.num_steps, lap.seconds, lap.data_seconds) == (5, 20.0, 0.0)
    assert lap.wall_seconds_per_step == 10.0
    assert clock.lap(108).wall_seconds_per_step == 10.0  # (70 - 10) s over 6 steps


def test_the_timer_of_forward_and_backward_counts_from_reading_to_reading():
    timer = DeviceTimer(CPU, now=iter([0.0, 2.0, 10.0, 13.0, 20.0, 21.0]).__next__)
    for expected in (5.0, 1.0):
        for _ in range(2 if expected == 5.0 else 1):
            with timer.running():
                pass
        assert timer.read() == expected
    assert timer.read() == 0.0


def test_the_parts_of_a_start_add_up_from_the_start_of_the_process():
    clock = StartClock()
    clock.done("imports")
    clock.done("checks")
    total, imports, checks = map(float, re.findall(r"\d+\.\d+", clock.report()))
    assert clock.report().endswith(f"s from the start: imports {imports:.2f}, checks {checks:.2f}")
    assert total == pytest.approx(imports + checks, abs=0.02) and imports > 0.2 > checks


def test_a_failing_pause_ends():
    clock = StepClock(step=0)
    with pytest.raises(KeyError), clock.paused():
        raise KeyError
    with clock.paused():
        assert clock.seconds_into_pause() >= 0


def test_save_for_all_ranks_keeps_metrics_jsonl_single(tmp_path):
    config = replace(CONFIG, enable_tensorboard=True, save_for_all_ranks=True)
    for rank in (0, 1):
        log(metrics := make_metrics(tmp_path, config, rank), 1)
        metrics.close()
    assert len(lines(tmp_path)) == 1
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == ["rank_0", "rank_1"]
