"""The model as one rank holds it: whole, or some stages of a pipeline. One interface to both."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchtitan.config.schema import Training
from torchtitan.data.batch import Batch
from torchtitan.distributed.fsdp import sync_gradients
from torchtitan.distributed.pipeline import Pipeline, TiedWeight
from torchtitan.models.decoder import TIED_WEIGHT, Decoder
from torchtitan.quantization.conversion import Conversion

Enter = Callable[[nn.Module, slice], None]
"""enter(part, rows): `part` is about to compute on these rows of a batch, forward or backward."""


@dataclass(frozen=True)
class Microbatches:
    """Rows of a batch, as many at a time as go through the model together."""

    batch: Batch
    rows: Sequence[slice]
    device: torch.device
    entering: Enter

    @classmethod
    def of(
        cls, batch: Batch, rows: range, size: int, device: torch.device, entering: Enter
    ) -> "Microbatches":
        """`size` rows a microbatch, the last one maybe fewer."""
        parts = [slice(start, min(start + size, rows.stop)) for start in rows[::size]]
        return cls(batch, parts, device, entering)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Sequences and tokens of each, of every microbatch."""
        return [(rows.stop - rows.start, self.batch.tokens.shape[1]) for rows in self.rows]

    def enter(self, part: Decoder, index: int) -> None:
        """Say that `part` is about to compute on this microbatch."""
        self.entering(part, self.rows[index])

    def inputs(self, part: Decoder, index: int) -> dict[str, Any]:
        """What `part` takes beside hidden states."""
        batch, rows = self.batch, self.rows[index]
        return {
            "tokens": self._on_device(batch.tokens[rows]),
            "labels": self._on_device(batch.labels[rows]),
            "documents": part.documents(batch.document_lengths[rows], self.device),
        }

    def _on_device(self, x: torch.Tensor) -> torch.Tensor:
        """Not waiting for the device, which it would out of memory that is not pinned."""
        pinned = x.pin_memory() if self.device.type == "cuda" else x
        return pinned.to(self.device, non_blocking=True)


class ModelParts:
    """A rank's parts of the model, in the model's order; without pipeline parallelism one, the whole.

    Names of parameters and buffers are the whole model's. A tied weight counts where it is owned.
    """

    def __init__(
        self,
        parts: Sequence[Decoder],
        pipeline: Pipeline | None,
        tied: TiedWeight | None,
        num_parameters: int,
        conversions: Sequence[Conversion],
        device: torch.device,
    ):
        self.parts, self.pipeline, self.tied, self.device = parts, pipeline, tied, device
        self.num_parameters, self.conversions = num_parameters, conversions
        """Of the whole model."""
        self.entering: Enter = lambda part, rows: None

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for part in self.parts:
            yield from part.named_modules()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part in self.parts:
            copied = self._copied_in(part)
            yield from (pair for pair in part.named_parameters() if pair[0] not in copied)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """The tensors in use that a checkpoint holds."""
        state: dict[str, Any] = {}
        for part in self.parts:
            copied = self._copied_in(part)
            state |= {n: tensor for n, tensor in part.state_dict().items() if n not in copied}
        return state

    def _copied_in(self, part: Decoder) -> tuple[str, ...]:
        has_copy = self.tied is not None and self.tied.copy is not None and part is self.parts[-1]
        return (TIED_WEIGHT,) if has_copy else ()

    def train(self, mode: bool = True) -> None:
        """Set the mode of all parts, training or evaluation."""
        for part in self.parts:
            part.train(mode)

    def forward_backward(
        self,
        batch: Batch,
        rows: range,
        num_tokens: int,
        training: Training,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> torch.Tensor:
        """Accumulate the gradient of these rows' loss, divided by `num_tokens`, and return that loss.

        It is an fp32 scalar, zero on ranks without the last stage of a pipeline. training.local_batch_size
        rows at a time go forward and backward, in a pipeline as microbatches. `mark` is told of phases.
        """
        total = torch.zeros((), device=self.device)
        starts = rows[:: training.local_batch_size]
        each = training.sync_gradients_each_microbatch
        for start in starts:
            microbatches = self._microbatches(batch, range(start, start + training.local_batch_size))
            last = start == starts[-1]
            if self.pipeline is None:
                total += self._run_whole(microbatches, num_tokens, last, each, mark)
            else:
                mark("forward and backward")
                total += self.pipeline.forward_backward(microbatches, num_tokens, last or each)
        if self.tied is not None:
            self.tied.add_gradient()
        return total

    def _run_whole(
        self,
        microbatch: Microbatches,
        num_tokens: int,
        last: bool,
        reduce_each: bool,
        mark: Callable[[str], None],
    ) -> torch.Tensor:
        [model] = self.parts
        sync_gradients(model, last, reduce_each)
        mark("forward")
        microbatch.enter(model, 0)
        loss = model(**microbatch.inputs(model, 0)) / num_tokens
        mark("backward")
        loss.backward()
        return loss.detach()

    def _microbatches(self, batch: Batch, rows: range) -> Microbatches:
        """In a pipeline of its microbatch size, else one of all rows."""
        size = len(rows) if self.pipeline is None else self.pipeline.microbatch_size
        return Microbatches.of(batch, rows, size, self.device, self.entering)

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch, summed over its tokens; zero on ranks without the last stage."""
        microbatches = self._microbatches(batch, range(len(batch.tokens)))
        if self.pipeline is not None:
            return self.pipeline.forward(microbatches)
        [model] = self.parts
        return model(**microbatches.inputs(model, 0))

    def weights_changed(self) -> None:
        """To be called after an optimizer step and after loading: what hangs on weights follows them."""
        if self.tied is not None:
            self.tied.copy_weight()
        for conversion in self.conversions:
            for part in self.parts if conversion.weights_changed else ():
                conversion.weights_changed(part)
