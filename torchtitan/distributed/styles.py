"""What a style means: the one place that turns it into placements and hooks.

Sequence parallelism is an argument, not a second plan: with it activations between layers are split
along the sequence (dim 1 of (B, L, D)), without it every rank has all of them. Between modules
activations are plain local tensors; inside a gathered module they are DTensors, so that the partial
gradients of its weights' products are added up once, where the module's input was gathered. Inside
a region (an MoE layer) all is local and partial, so that its parts' outputs are added up once.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from torchtitan.config.schema import Parallelism
from torchtitan.distributed.parameter_views import use_local_parameters
from torchtitan.ops.cross_entropy import linear_cross_entropy
from torchtitan.ops.wide import widened
from torchtitan.sharding import Style

SEQUENCE_DIM = 1


def apply_styles(
    model: nn.Module,
    styles: dict[str, Style],
    mesh: DeviceMesh,
    sequence_parallel: bool,
    split_regions: bool,
) -> None:
    """Split the modules named in `styles` over a one-dimensional mesh, in place.

    Experts are not among them, see expert_parallel/apply.py. Without `split_regions` every rank puts
    its own part of the sequence through whole regions, and only weights' gradients are added up.
    """
    between = Shard(SEQUENCE_DIM) if sequence_parallel else Replicate()
    if not split_regions:
        whole = {Style.REGION_COLWISE: Style.LOCAL, Style.REGION_ROWWISE: Style.LOCAL}
        styles = {name: whole.get(style, style) for name, style in styles.items()}
        styles = {name: style for name, style in styles.items() if style is not Style.REGION}
    meanings = {
        name: _meaning(style, between)
        for name, style in styles.items()
        if style is not Style.EXPERTS
    }
    parallelize_module(model, mesh, meanings)


_SPLIT_DIM = {
    Style.COLWISE: 0,
    Style.HEADS_COLWISE: 0,
    Style.REGION_COLWISE: 0,
    Style.ROWWISE: 1,
    Style.HEADS_ROWWISE: 1,
    Style.REGION_ROWWISE: 1,
}


def local_widths(
    shape: Sequence[int], style: Style, tp: int, split_regions: bool
) -> tuple[int, int]:
    """Of a Linear layer's weight, the part (out, in) that a tensor-parallel rank has."""
    whole = not split_regions and style in (Style.REGION_COLWISE, Style.REGION_ROWWISE)
    dim = None if whole else _SPLIT_DIM.get(style)
    rows, columns = (n // tp if i == dim else n for i, n in enumerate(shape))
    return rows, columns


def loss_layout(tp: int, config: Parallelism) -> AbstractContextManager[None]:
    """Put around forward and backward: the loss is computed from logits split over the vocabulary.

    With parallelism.disable_loss_parallel every rank gathers all logits instead.
    """
    return loss_parallel() if tp > 1 and not config.disable_loss_parallel else nullcontext()


def _meaning(style: Style, between: Placement) -> ParallelStyle:
    match style:
        case Style.EMBEDDING:
            return _Embedding(input_layouts=Replicate(), output_layouts=between)
        case Style.SEQUENCE:
            # Also where every rank has all activations: foreach kernels take one mesh at a time.
            sequence = SequenceParallel(use_local_output=True)
            sequence.sequence_sharding = (between,)
            return sequence
        case Style.GATHER:
            return _Gather(between)
        case Style.COLWISE:
            return ColwiseParallel()
        case Style.ROWWISE:
            return RowwiseParallel(output_layouts=between)
        case Style.NORM_COLWISE:
            return _SplitNorm()
        case Style.LOCAL:
            return _LocalWeight()
        case Style.HEADS | Style.REGION:
            return _Region(between)
        case Style.HEADS_COLWISE | Style.REGION_COLWISE:
            return _LocalWeight(Shard(0))
        case Style.HEADS_ROWWISE | Style.REGION_ROWWISE:
            return _LocalWeight(Shard(1))
        case Style.HEAD:
            return _Head(between)


class _Embedding(RowwiseParallel):
    """RowwiseParallel whose output is a copy.

    On torch 2.13 a compiled layer that reads the output of a DTensor's redistribution directly gets a
    wrong gradient for the embedding, or fails; 2.11 does not. The copy costs one pass over (B, L, D).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(lambda module, inputs, output: output.clone())
        return module


class _Gather(ParallelStyle):
    """Makes the first input whole; its gradient goes back to where the input was."""

    def __init__(self, given: Placement):
        self.given = given

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(_gather_first, self.given, device_mesh))
        return module


class _Region(ParallelStyle):
    """Gathers the input, as a local tensor with a partial gradient; adds up the partial output."""

    def __init__(self, between: Placement):
        self.between = between

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(_enter_region, self.between, device_mesh))
        module.register_forward_hook(partial(_leave_region, self.between, device_mesh))
        return module


class _LocalWeight(ParallelStyle):
    """Computes with this rank's part of the weight, or with a whole one whose gradient is summed."""

    def __init__(self, placement: Placement | None = None):
        self.placement = placement or Replicate()
        self.of_grad = placement or Partial()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        parameters = dict(module.named_parameters(recurse=False))
        for name, parameter in parameters.items():
            spread = distribute_tensor(parameter, device_mesh, [self.placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(spread))
        use_local_parameters(module, dict.fromkeys(parameters, (self.of_grad,)))
        return module


class _SplitNorm(ParallelStyle):
    """Ranks add up their sums of squares, a number a token, in place of gathering the features."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.__class__, module.mesh = _SplitRMSNorm, device_mesh
        return _LocalWeight(Shard(0))._apply(module, device_mesh)


class _SplitRMSNorm(nn.RMSNorm):
    """RMSNorm of this rank's part of the features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = widened(x)
        squares = wide.square().sum(-1, keepdim=True)
        squares = DTensor.from_local(squares, self.mesh, [Partial()], run_check=False)
        squares = squares.redistribute(placements=[Replicate()])
        # What comes back is each rank's share, for its own features.
        squares = squares.to_local(grad_placements=[Partial()])
        rms = (squares / self.normalized_shape[0] + self.eps).sqrt()
        return (wide / rms * self.weight).to(x.dtype)


class _Head(ParallelStyle):
    """Splits the output weight by token id; logits stay split where the loss is parallel."""

    def __init__(self, given: Placement):
        self.given = given

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if module.weight is not None:  # a tied weight is split where it lives
            weight = distribute_tensor(module.weight, device_mesh, [Shard(0)], src_data_rank=None)
            module.weight = nn.Parameter(weight)
        module.loss = linear_cross_entropy
        module.register_forward_pre_hook(partial(_gather_head_inputs, self.given, device_mesh))
        # A copy, since FSDP's hooks and in-place changes of a view go badly together.
        module.register_forward_hook(lambda module, inputs, output: output.full_tensor().clone())
        return module


def _gather_first(given: Placement, mesh: DeviceMesh, module: nn.Module, inputs: tuple) -> tuple:
    first = DTensor.from_local(inputs[0], mesh, [given], run_check=False)
    return first.redistribute(placements=[Replicate()]), *inputs[1:]


def _enter_region(between: Placement, mesh: DeviceMesh, module: nn.Module, inputs: tuple) -> tuple:
    first, *rest = _gather_first(between, mesh, module, inputs)
    return first.to_local(grad_placements=[Partial()]), *rest


def _leave_region(
    between: Placement, mesh: DeviceMesh, module: nn.Module, inputs: tuple, output: torch.Tensor
) -> torch.Tensor:
    whole = DTensor.from_local(output, mesh, [Partial()], run_check=False)
    return whole.redistribute(placements=[between]).to_local()


def _gather_head_inputs(given: Placement, mesh: DeviceMesh, module: nn.Module, inputs: tuple):
    hidden, labels, *rest = _gather_first(given, mesh, module, inputs)
    if labels is not None:
        labels = DTensor.from_local(labels, mesh, [Replicate()], run_check=False)
    return hidden, labels, *rest
