"""The trainer: builds the parts of a run, then batch, forward and backward, clip, step, log, save."""

import gc
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import sdpa_kernel

from torchtitan.build import build_data, build_metrics, build_model
from torchtitan.checkpoint.find import read_config
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.config.schema import Training, Validation
from torchtitan.config.toml_file import as_table
from torchtitan.data.batch import Batch
from torchtitan.data.loader import Loader
from torchtitan.distributed.comm import World, set_timeout
from torchtitan.distributed.context_parallel import sequence_part
from torchtitan.distributed.fsdp import Precision
from torchtitan.distributed.grad_norm import clip_factor, global_grad_norm
from torchtitan.distributed.styles import loss_layout
from torchtitan.expert_load import ExpertLoad
from torchtitan.kernel_choice import choose_expert_kernels
from torchtitan.logging import logger
from torchtitan.models.attention import SDPA_PRIORITY
from torchtitan.nonfinite import why_not_finite
from torchtitan.observability.clock import StartClock
from torchtitan.observability.profiling import StepRecorders
from torchtitan.observability.watchdog import Watchdog
from torchtitan.optim.nonfinite import NonFiniteGuard
from torchtitan.optim.optimizer import build_optimizer, set_learning_rate, state_by_name, take_step
from torchtitan.optim.schedule import learning_rate
from torchtitan.preemption import StopRequest
from torchtitan.preflight import Setup
from torchtitan.reproducibility import arithmetic
from torchtitan.run_record import describe, moved_data, resolved_config, save_config
from torchtitan.validation import validate


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        setup: Setup,
        world: World,
        device: torch.device,
        watchdog: Watchdog,
        stop: StopRequest | None = None,
        start: StartClock | None = None,
    ):
        self.setup, self.world, self.device, self.watchdog = setup, world, device, watchdog
        self.stop, self.start = stop or StopRequest(), start or StartClock()
        self.stopping = False  # what the ranks have agreed on
        self.config = config = resolved_config(setup)
        self.step = setup.progress.get("step", 0)
        self.n_tokens_seen = setup.progress.get("n_tokens_seen", 0)
        self.arithmetic = arithmetic(config.debug)
        self.part = sequence_part(config.parallelism, setup.degrees, world.rank)
        self.precision = Precision.resolve(config, device)
        self.model = build_model(setup.model_config, setup.degrees, self.precision, config, device)
        choose_expert_kernels(self.model, setup.model_config, setup.degrees, self.precision, config)
        self.expert_load = ExpertLoad(self.model, setup.model_config, setup.degrees, config.parallelism)
        self.nonfinite = NonFiniteGuard(config.training)
        named, seed = self.model.named_parameters(), config.debug.seed
        self.optimizer = build_optimizer(named, config.optimizer, self.precision.compute, seed)
        self.checkpoints = CheckpointManager(
            config.checkpoint,
            self.dump_folder,
            self.model.state_dict,
            state_by_name(self.optimizer),
            setup.hf,
            origin={"layout": asdict(setup.degrees), "config": asdict(config)},
        )
        if setup.checkpoint is not None:
            self.checkpoints.load(setup.checkpoint)
            self.model.weights_changed()
        self.loader = self._build_loader(config.training, setup.global_batch_size)
        if "slots" in setup.progress:
            self.loader.load_state_dict(setup.progress["slots"])
            if warning := moved_data(config.training, read_config(setup.checkpoint)["training"]):
                logger.warning(warning)
        if config.validation.enable:
            size = config.validation.local_batch_size * setup.degrees.dp
            self.validation_loader = self._build_loader(config.validation, size)
        self.metrics = build_metrics(config, setup.model_config, world, device)
        if world.rank == 0:
            save_config(config)
        for line in describe(config, setup.degrees, self.precision, self.model, self.optimizer):
            logger.info(line)
        self.start.done("model and data")

    def run(self) -> bool:
        """Train to the last step, until the data ends, or until told to stop; whether all is done."""
        if self.config.checkpoint.create_seed_checkpoint:
            self.checkpoints.save_seed({"seed": self.config.debug.seed})
            return True
        first, num_steps = self.step + 1, self.config.training.steps
        done = self.step >= num_steps or self.setup.progress.get("data_ended", False)
        if done:
            logger.info(f"there is nothing left to train after step {self.step}")
        with ExitStack() as stack:
            recorders = self._enter_recorders(stack)
            self._over_ranks(0)  # who was told to stop while the run was set up?
            while not done and not self.stopping:
                batch = self._next_batch()
                if batch is None:
                    logger.info(f"the data ended after step {self.step}")
                    self._save(last=True, data_ended=True)
                    done = True
                    break
                self.step += 1
                done = self.step == num_steps
                self._train_step(batch)
                if self.step == first:
                    self.start.done("first step")
                    logger.info(f"ready {self.start.report()}")
                self._validate()
                self._save(last=done)
                self._collect_garbage()
                recorders.step()
                if self.step == first:
                    self._set_timeouts(self.config.comm.train_timeout_seconds)
            self._end(done)
        return done

    def _end(self, done: bool) -> None:
        """Wait for what is still being saved, and tell why the run ends early."""
        with self._pause("checkpoint"):
            self.checkpoints.writer.finish()
        if not done:
            logger.info(self.stop.farewell(self.step))

    def _enter_recorders(self, stack: ExitStack) -> StepRecorders:
        """Start what accompanies the loop, and leave it as it was afterwards."""
        config = self.config
        gc.disable()  # collections happen at chosen steps only
        stack.callback(gc.enable)
        # cuDNN's backward adds up in no fixed order.
        kernels = SDPA_PRIORITY[1:] if config.debug.deterministic else SDPA_PRIORITY
        stack.enter_context(sdpa_kernel(kernels, set_priority=True))
        stack.enter_context(loss_layout(self.setup.degrees.tp, config.parallelism))
        self.metrics.start(self.step, as_table(self.config))
        stack.callback(self.metrics.close)
        stack.callback(self._report_skipped_documents)
        return stack.enter_context(
            StepRecorders(
                config.profiling,
                config.job.dump_folder,
                rank=self.world.rank,
                device=self.device,
                step=self.step,
            )
        )

    def _train_step(self, batch: Batch) -> None:
        degrees, batch = self.setup.degrees, batch.cut(self.part)
        num_tokens = self._over_ranks(batch.num_valid_tokens)
        with self.metrics.forward_backward():
            loss = self._forward_backward(batch, num_tokens) / degrees.tp

        self.watchdog.mark(self.step, "optimizer")
        norm, loss = global_grad_norm(self.model.parameters(), loss, degrees.stage_size)
        factor = clip_factor(norm, self.config.training.max_norm)
        self.loader.prefetch()  # a GPU is still busy with backward
        norm_value, loss_value = torch.stack([norm, loss]).tolist()
        schedule = self.config.lr_scheduler
        lr = learning_rate(self.step, self.config.optimizer.lr, schedule, self.config.training.steps)
        may_step = self.nonfinite.may_step(
            self.step, loss_value, norm_value, partial(self._why_not_finite, batch)
        )
        if may_step:
            set_learning_rate(self.optimizer, lr)
            take_step(self.optimizer, factor)
            self.model.weights_changed()
        self.optimizer.zero_grad()
        self.expert_load.finish_step(may_step)

        self.n_tokens_seen += num_tokens
        if self.metrics.should_log(self.step):
            self.metrics.log(
                self.step,
                loss=loss_value,
                grad_norm=norm_value,
                lr=lr,
                n_tokens_seen=self.n_tokens_seen,
                **self.expert_load.statistics(),
            )

    def _why_not_finite(self, batch: Batch) -> str:
        with self._pause("a step that is not finite"), self.arithmetic:
            return why_not_finite(self.expert_load, self.model, self.config.compile, batch)

    def _forward_backward(self, batch: Batch, num_tokens: int) -> torch.Tensor:
        """Accumulate the gradient of the mean loss over the global batch's valid tokens.

        Returns this rank's share of that loss, an fp32 scalar.
        """
        rows, mark = range(len(batch.tokens)), partial(self.watchdog.mark, self.step)
        training = self.config.training
        with self.arithmetic:
            return self.model.forward_backward(batch, rows, max(num_tokens, 1), training, mark)

    def _next_batch(self) -> Batch | None:
        """This rank's share of the next global batch; None when no rank has data left."""
        self.watchdog.mark(self.step + 1, "data")
        with self.metrics.loading_data():
            batch = next(self.loader)
        if self.config.training.repeat or self._over_ranks(int(not batch.exhausted)):
            return batch
        return None

    def _over_ranks(self, count: int) -> int:
        """Sum of a count over the data-parallel ranks; on the host, the GPU is not waited for.

        Whether any rank was told to stop goes with it, and needs no exchange of its own.
        """
        totals = torch.tensor([count, bool(self.stop.reason)])
        dist.all_reduce(totals)
        self.stopping |= bool(totals[1])
        return int(totals[0]) // self.setup.degrees.token_copies

    def _validate(self) -> None:
        validation = self.config.validation
        if not validation.enable or (self.step != 1 and self.step % validation.freq):
            return
        with self._pause("validation"), self.arithmetic:
            batches = self._validation_batches(validation.steps)
            loss, num_tokens = validate(self.model, batches, self.setup.degrees)
            self.metrics.log_validation(self.step, loss=loss, num_tokens=num_tokens)
            if not math.isfinite(loss) and (cause := self.expert_load.overflow()):
                logger.warning(f"validation loss {loss}: {cause}")

    def _validation_batches(self, num_batches: int) -> Iterator[Batch]:
        """This rank's shares of so many batches; of -1, all the data and then empty ones."""
        self.validation_loader.restart()
        for batch in islice(self.validation_loader, None if num_batches == -1 else num_batches):
            self.watchdog.mark(self.step, "validation")
            yield batch.cut(self.part)

    def _save(self, last: bool, data_ended: bool = False) -> None:
        self.checkpoints.writer.raise_failure()
        if self.checkpoints.wants_save(self.step, last or self.stopping):
            with self._pause("checkpoint"):
                progress = self._progress() | {"data_ended": data_ended}
                self.checkpoints.save(self.step, progress, last, wait=self.stopping)

    @contextmanager
    def _pause(self, phase: str) -> Iterator[None]:
        """Around what is not training: it has the longer timeout, and throughput leaves it out."""
        comm = self.config.comm
        self.watchdog.mark(self.step, phase)
        self._set_timeouts(comm.init_timeout_seconds)
        with self.metrics.paused():
            yield
        self._over_ranks(0)  # a long pause is when ranks are told to stop
        self._set_timeouts(comm.train_timeout_seconds)

    def _set_timeouts(self, seconds: float) -> None:
        self.watchdog.set_timeout(seconds)
        set_timeout(seconds)

    def _progress(self) -> dict[str, Any]:
        slots: list[dict[str, Any]] = [{}] * self.world.size
        dist.all_gather_object(slots, self.loader.state_dict())
        return {
            "n_tokens_seen": self.n_tokens_seen,
            "seed": self.config.debug.seed,
            "global_batch_size": self.setup.global_batch_size,
            "slots": {slot: state for states in slots for slot, state in states.items()},
        }

    def _report_skipped_documents(self) -> None:
        if count := self.loader.num_skipped_documents:
            logger.warning(f"{count} documents of this rank's data could not be used")

    def _collect_garbage(self) -> None:
        """All ranks at the same steps: a collection on one would make the others wait."""
        training = self.config.training
        if training.gc_debug or self.step % training.gc_freq == 0:
            found = gc.collect()
            if training.gc_debug and found:
                logger.info(f"step {self.step}: garbage in reference cycles, {found} objects")

    @property
    def dump_folder(self) -> Path:
        return Path(self.config.job.dump_folder)

    def _build_loader(self, section: Training | Validation, num_slots: int) -> Loader:
        """The loader of this rank's share of `num_slots` sequences."""
        degrees, seed = self.setup.degrees, self.config.debug.seed
        slots = degrees.slots(self.world.rank, num_slots)
        return build_data(section, self.setup.tokenizer, num_slots, slots, seed)
