"""Adam's update as one Triton kernel a parameter: each number is read once and written once.

Imported on first use on a GPU: PyTorch for CPUs comes without Triton. All arithmetic is in fp32.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

_BLOCK = 1024


class Hyperparameters(NamedTuple):
    """Of Adam (arXiv 1412.6980), with decoupled weight decay (arXiv 1711.05101) where `decoupled`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool


def update_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    copy: torch.Tensor | None,
    step: torch.Tensor,
    factor: torch.Tensor,
    of: Hyperparameters,
) -> None:
    """One step in place, as torch.optim's, of fp32 tensors (contiguous, equal in size).

    The gradient may have another dtype and other strides; it counts times factor () fp32, and is not
    changed. `copy`, of any dtype, becomes a copy of the weight. step () fp32 is this step's number, 1 at
    first.
    """
    tensors = (weight, grad.contiguous(), exp_avg, exp_avg_sq, copy)
    strides = [tensor.stride() for tensor in tensors if tensor is not None]
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors), strides
    if not weight.numel():
        return
    logs = [math.log(beta) if beta else -math.inf for beta in (of.beta1, of.beta2)]
    grid = (triton.cdiv(weight.numel(), _BLOCK),)
    _update[grid](*tensors, step, factor, *of, *logs, weight.numel(), _BLOCK)


@triton.jit
def _update(
    weights,
    grads,
    averages,
    squares,
    copies,
    step,
    factor,
    lr,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    weight_decay: tl.constexpr,
    decoupled: tl.constexpr,
    log_beta1: tl.constexpr,
    log_beta2: tl.constexpr,
    size,
    block: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    # What beta ** step leaves of 1 is small at first: in fp32 it would have few digits.
    number = tl.load(step).to(tl.float64)
    of_average = (1.0 - tl.exp(number * log_beta1)).to(tl.float32)
    of_square = tl.sqrt(1.0 - tl.exp(number * log_beta2)).to(tl.float32)
    weight = tl.load(weights + at, inside, other=0.0)
    grad = tl.load(grads + at, inside, other=0.0).to(tl.float32) * tl.load(factor)
    if decoupled:
        weight = weight * (1.0 - lr * weight_decay)
    else:
        grad += weight_decay * weight
    average = tl.load(averages + at, inside, other=0.0)
    average += (grad - average) * (1.0 - beta1)
    square = tl.load(squares + at, inside, other=0.0) * beta2 + grad * grad * (1.0 - beta2)
    weight -= lr / of_average * average / (tl.sqrt(square) / of_square + eps)
    tl.store(weights + at, weight, inside)
    if copies is not None:
        tl.store(copies + at, weight.to(copies.dtype.element_ty), inside)
    tl.store(averages + at, average, inside)
    tl.store(squares + at, square, inside)
