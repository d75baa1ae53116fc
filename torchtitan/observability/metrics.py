"""What does a run report? Loss, throughput, utilisation and memory of logged steps.

Values come in as Python floats and on logged steps only, so that no other step waits for the GPU.
docs/metrics.md defines every field.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchtitan.config.schema import Metrics
from torchtitan.logging import logger
from torchtitan.observability.clock import DeviceTimer, Lap, StepClock
from torchtitan.observability.console import shows_color, training_line, validation_line
from torchtitan.observability.memory import MemoryMonitor
from torchtitan.observability.peak_flops import peak_flops
from torchtitan.observability.sinks import Sink, open_sinks


@dataclass(frozen=True)
class Workload:
    """What a step computes, over all devices: the measure of throughput."""

    num_steps: int
    """training.steps."""
    tokens_per_step: int
    """Positions in a global batch, padding and unlabelled ones too: all of them cost the same."""
    flops_per_token: tuple[float, float]
    """Forward and backward; attention counted in full, and only what masks leave of it."""
    num_devices: int


class MetricsLogger:
    """Reports a run's steps; every rank makes one and calls it alike, with the global values."""

    def __init__(
        self,
        config: Metrics,
        dump_folder: str,
        workload: Workload,
        *,
        rank: int,
        device: torch.device,
    ):
        self._config, self._dump_folder, self._rank = config, Path(dump_folder), rank
        self._workload, self._device = workload, device
        self._memory = MemoryMonitor(device)
        self._color = shows_color() and not config.disable_color_printing
        self._sinks: list[Sink] = []
        self._clock = StepClock(0)
        self._forward_backward = DeviceTimer(device)
        self._peak_flops = None
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            self._peak_flops = peak_flops(name)
            if self._peak_flops is None:
                logger.warning(f"the peak FLOP/s of '{name}' is not known: no MFU is reported")

    def start(self, step: int, run: Mapping[str, Any]) -> None:
        """Open the outputs and start the clock.

        `step` is 0, or the step the run resumes from; `run` the whole config as nested tables.
        """
        self._sinks = open_sinks(self._config, self._dump_folder, run, rank=self._rank, step=step)
        self._clock = StepClock(step)

    def should_log(self, step: int) -> bool:
        return step == 1 or step % self._config.log_freq == 0

    def loading_data(self) -> AbstractContextManager[None]:
        """Put around the wait for a batch."""
        return self._clock.loading_data()

    def forward_backward(self) -> AbstractContextManager[None]:
        """Put around the forward and backward passes of a step."""
        return self._forward_backward.running()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Put around what is not training (validation, checkpoints); throughput leaves it out."""
        if self._device.type == "cuda":
            # Steps still queued on the GPU are training, and not to be counted as the pause's.
            torch.cuda.synchronize(self._device)
        with self._clock.paused():
            yield

    def log(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        n_tokens_seen: int,
        **more: float,
    ) -> None:
        """Report training step `step`; `more` goes to the files but not to the console.

        That `loss` is known means that forward and backward are over, on a GPU too.
        """
        lap = self._clock.lap(step)
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "n_tokens_seen": n_tokens_seen,
            **self._speed(lap),
            "forward_backward_seconds_per_step": self._forward_backward.read() / lap.num_steps,
            **self._memory.read(),
            **more,
        }
        eta = lap.wall_seconds_per_step
        if eta is not None:
            eta *= self._workload.num_steps - step
        logger.info(training_line(record, eta, color=self._color))
        self._write(record)

    def log_validation(self, step: int, *, loss: float, num_tokens: int) -> None:
        """Report a validation over `num_tokens` valid labels in all; call it inside its paused()."""
        seconds = self._clock.seconds_into_pause()
        tokens_per_second = num_tokens / seconds
        record = {
            "step": step,
            "validation_loss": loss,
            "validation_seconds": seconds,
            "validation_tokens_per_second": tokens_per_second,
            "validation_tokens_per_second_per_device": tokens_per_second
            / self._workload.num_devices,
            **self._memory.read(),
        }
        logger.info(validation_line(record, color=self._color))
        self._write(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _speed(self, lap: Lap) -> dict[str, float]:
        work = self._workload
        tokens_per_second = lap.num_steps * work.tokens_per_step / lap.seconds
        per_device = tokens_per_second / work.num_devices
        full, causal = (flops * per_device for flops in work.flops_per_token)  # FLOP/s of a device
        speed = {
            "seconds_per_step": lap.seconds / lap.num_steps,
            "data_seconds_per_step": lap.data_seconds / lap.num_steps,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": per_device,
            "tflops": full / 1e12,
        }
        if self._peak_flops is not None:
            speed["mfu"] = speed["mfu_full_attention"] = 100 * full / self._peak_flops
            speed["mfu_causal_attention"] = 100 * causal / self._peak_flops
        return speed

    def _write(self, record: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.write({**record, "time": time.time()})
