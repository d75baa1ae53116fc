"""Pipeline parallelism: a rank's stages of the model, run by one of torch's schedules.

Stages send each other hidden states; all else about a microbatch every rank reads by itself. B
sequences of a microbatch, L tokens of each, D model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)
from torch.utils.checkpoint import GraphExecGroup

from torchtitan.config.pipeline import PipelinePlan
from torchtitan.distributed.local_parts import local_part


class Microbatches(Protocol):
    """What a run of the schedule works on, by a microbatch's index."""

    shapes: Sequence[tuple[int, int]]
    """(B, L) of each."""

    def enter(self, part: nn.Module, index: int) -> None:
        """`part` is about to compute on this microbatch, forward or backward."""

    def inputs(self, part: nn.Module, index: int) -> dict[str, Any]:
        """What `part` takes beside hidden states."""


@dataclass(frozen=True)
class Hidden:
    """What stages send each other."""

    dim: int
    dtype: torch.dtype
    sequence_parts: int
    """Ranks that each hold a part of the sequence."""

    def empty(self, num_sequences: int, length: int, **options: Any) -> torch.Tensor:
        """Room for the hidden states of a microbatch, (B, L / sequence_parts, D)."""
        shape = (num_sequences, length // self.sequence_parts, self.dim)
        return torch.empty(shape, dtype=self.dtype, **options)


class _Stage(PipelineStage):
    """A stage that asks for its inputs, and reduces gradients over data-parallel ranks when told to.

    Overrides what torch's schedules call for each microbatch; checked on torch 2.13.
    """

    microbatches: Microbatches
    reduces = True

    def forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, **options):
        self.microbatches.enter(self.submod, fwd_chunk_id)
        # Not as kwargs: torch 2.11 takes all of them for tensors that may need gradients.
        self.inputs = self.microbatches.inputs(self.submod, fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, args, {}, **options)

    def forward_maybe_with_nosync(self, *hidden):
        return self.submod(hidden=hidden[0] if hidden else None, **self.inputs)

    def backward_one_chunk(self, bwd_chunk_id, **options):
        self.microbatches.enter(self.submod, bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, **options)

    def backward_weight_one_chunk(self, bwd_chunk_id, **options):
        self.microbatches.enter(self.submod, bwd_chunk_id)
        # torch asks for the gradient of one weight after the other: all from one recomputation.
        with GraphExecGroup():
            super().backward_weight_one_chunk(bwd_chunk_id, **options)
        for module in self.submod.modules():
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
                group.post_backward()  # microbatches add up in the dtype of the gradient reduction

    def perform_reduce_grad(self, grad_scale_factor: int):
        if self.reduces:
            super().perform_reduce_grad(grad_scale_factor)


class Pipeline:
    """This rank's stages, and what moves microbatches through them.

    `parts` are the modules of the rank's stages, in the model's order. Each takes `hidden` (B, L, D)
    and what its inputs say, and returns hidden states; the last of all stages a loss, summed over tokens.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        parts: Sequence[nn.Module],
        group: dist.ProcessGroup,
        hidden: Hidden,
        length: int,
        device: torch.device,
    ):
        """`length` is L of all training batches."""
        self.plan, self.group, self.hidden, self.device = plan, group, hidden, device
        self.rank = dist.get_rank(group)
        self.microbatch_size = plan.parallelism.pipeline_parallel_microbatch_size
        self.stages = [
            self._stage(index, part, length)
            for index, part in zip(plan.stages_of(self.rank), parts, strict=True)
        ]
        self.num_tokens = 1
        self.schedule = self._schedule()

    def _stage(self, index: int, part: nn.Module, length: int) -> _Stage:
        # On 2.13 these must say that they need gradients, or none come back. Without them torch
        # would run each stage once to find out, and count that microbatch's routing.
        options = {"device": "meta", "requires_grad": True}
        between = self.hidden.empty(self.microbatch_size, length, **options)
        last = index == self.plan.num_stages - 1
        return _Stage(
            part,
            index,
            self.plan.num_stages,
            self.device,
            input_args=between if index else (),
            output_args=torch.empty((), dtype=torch.float32, **options) if last else between,
            group=self.group,
        )

    def _schedule(self) -> Any:
        if self.plan.csv is not None:
            kind = _PipelineScheduleRuntime
        else:
            kind = get_schedule_class(self.plan.schedule.name)
        single = issubclass(kind, PipelineScheduleSingle)
        schedule = kind(
            self.stages[0] if single else self.stages,
            self.plan.num_microbatches,
            loss_fn=lambda loss, index: loss / self.num_tokens,
            scale_grads=False,
        )
        if self.plan.csv is not None:
            schedule._load_csv(self.plan.csv.path)  # no public way in 2.13
        return schedule

    def forward_backward(
        self, microbatches: Microbatches, num_tokens: int, reduces: bool
    ) -> torch.Tensor:
        """One run of the schedule: gradients of the loss over `num_tokens`, and that loss.

        The loss is zero on ranks without the last stage. Gradients are reduced over data-parallel
        ranks where `reduces`, and else added up until then.
        """
        self.num_tokens = num_tokens
        for stage in self.stages:
            stage.microbatches, stage.reduces = microbatches, reduces
        losses: list[torch.Tensor] = []
        index = torch.arange(self.plan.num_microbatches)  # a target there must be
        self.schedule.step(target=index, losses=losses, return_outputs=False)
        if not losses:
            return torch.zeros((), device=self.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    def forward(self, microbatches: Microbatches) -> torch.Tensor:
        """The summed loss, without backward and for any schedule; zero on ranks without the last stage.

        Stage by stage, so that all that two ranks send each other one way is posted before the other.
        """
        loss = torch.zeros((), device=self.device)
        ranks, shapes = self.plan.ranks, microbatches.shapes
        sends, outputs = [], []
        for stage in self.stages:
            index, part = stage.stage_index, stage.submod
            receives: list[dist.Work] = []
            given, outputs = outputs, []
            if index and ranks[index - 1] != self.rank:
                given = [self.hidden.empty(*shape, device=self.device) for shape in shapes]
                source = ranks[index - 1]
                receives = [dist.irecv(x, group=self.group, group_src=source) for x in given]
            for i in range(len(shapes)):
                if receives:
                    receives[i].wait()
                microbatches.enter(part, i)
                out = part(hidden=given[i] if index else None, **microbatches.inputs(part, i))
                if stage.is_last:
                    loss += out
                elif ranks[index + 1] == self.rank:
                    outputs.append(out)
                else:
                    sends.append(dist.isend(out, group=self.group, group_dst=ranks[index + 1]))
        for send in sends:
            send.wait()
        return loss


class TiedWeight:
    """A weight that the first stage owns and the last one uses as well, through a copy.

    The copy's gradient goes to the owner before the gradient norm, and the new weight comes back
    after the step: the optimizer, the norm and checkpoints know the owner only.
    """

    def __init__(
        self, plan: PipelinePlan, group: dist.ProcessGroup, weights: Sequence[nn.Parameter]
    ):
        """`weights` are those of this rank's stages that have one, in the model's order."""
        self.group, self.ends = group, (plan.ranks[0], plan.ranks[-1])
        rank = dist.get_rank(group)
        self.owner = weights[0] if rank == self.ends[0] else None
        self.copy = weights[-1] if rank == self.ends[1] else None

    @torch.no_grad()
    def add_gradient(self) -> None:
        """To the owner's, once the copy's is complete."""
        source = None if self.copy is None else local_part(self.copy.grad)
        target = None if self.owner is None else local_part(self.owner.grad)
        self._move(source, target, torch.Tensor.add_)
        if self.copy is not None:
            self.copy.grad = None

    @torch.no_grad()
    def copy_weight(self) -> None:
        """From the owner, whose value may have changed."""
        source = None if self.owner is None else local_part(self.owner)
        target = None if self.copy is None else local_part(self.copy)
        self._move(source, target, torch.Tensor.copy_)

    def _move(
        self,
        source: torch.Tensor | None,
        target: torch.Tensor | None,
        put: Callable[[torch.Tensor, torch.Tensor], Any],
    ) -> None:
        other_end = self.ends[1] if self.owner is not None else self.ends[0]
        if source is not None and target is not None:
            put(target, source)
        elif source is not None:
            dist.send(source, group=self.group, group_dst=other_end)
        elif target is not None:
            received = torch.empty_like(target)
            dist.recv(received, group=self.group, group_src=other_end)
            put(target, received)
