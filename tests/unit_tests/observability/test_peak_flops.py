"""Peaks of devices, by the names their drivers give; none rather than a wrong one."""

import pytest
import torch

from torchtitan.config.schema import Metrics
from torchtitan.observability.clock import Lap
from torchtitan.observability.metrics import MetricsLogger, Workload
from torchtitan.observability.peak_flops import peak_flops

LAP = Lap(num_steps=2, seconds=4.0, data_seconds=1.0, wall_seconds_per_step=None)
WORKLOAD = Workload(num_steps=10, tokens_per_step=1000, flops_per_token=(4e9, 3e9), num_devices=5)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
        ("AMD Instinct MI250X / MI250", 191.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H1000", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_peak(name, tera):
    assert peak_flops(name) == (tera and tera * 1e12)


def test_mfu_in_both_conventions_and_none_without_a_peak(tmp_path):
    metrics = MetricsLogger(Metrics(), str(tmp_path), WORKLOAD, rank=0, device=torch.device("cpu"))
    assert not {key for key in metrics._speed(LAP) if key.startswith("mfu")}
    metrics._peak_flops = 1e12
    speed = metrics._speed(LAP)
    # 2 steps of 1000 tokens in 4 s on 5 devices: 100 tokens/s each, 0.4 of 1 TFLOP/s.
    assert speed == pytest.approx(
        {
            "seconds_per_step": 2.0,
            "data_seconds_per_step": 0.5,
            "tokens_per_second": 500.0,
            "tokens_per_second_per_device": 100.0,
            "tflops": 0.4,
            "mfu": 40.0,
            "mfu_full_attention": 40.0,
            "mfu_causal_attention": 30.0,
        }
    )
