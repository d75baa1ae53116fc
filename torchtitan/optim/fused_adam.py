"""Adam and AdamW on GPUs in one kernel a parameter, which clips the gradient as it reads it."""

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim import AdamW

from torchtitan.distributed.cast_copy import cast_copy, is_plain
from torchtitan.distributed.local_parts import local_part


class FusedAdamW(AdamW):
    """torch.optim.AdamW with `fused=True`, of fp32 parameters on GPUs, in less traffic.

    An update moves 28 bytes a number; clipping before it, and torch's kernel, 40. `gradient_factor`, a
    scalar fp32 tensor, is what one step, the next, multiplies gradients by, which stay as they are.
    Gradients may be bf16; kept copies of parameters (`CastCopy`) are written with them.
    """

    gradient_factor: torch.Tensor | None = None
    decoupled = True

    @torch.no_grad()
    def step(self) -> None:
        from torchtitan.ops import triton_adam  # PyTorch for CPUs comes without Triton

        factor, self.gradient_factor = self.gradient_factor, None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self.state[param] for param in params]
            torch._foreach_add_([state["step"] for state in states], 1)
            if factor is None:
                factor = torch.ones((), device=local_part(params[0]).device)
            of = triton_adam.Hyperparameters(
                group["lr"], *group["betas"], group["eps"], group["weight_decay"], self.decoupled
            )
            for param, state in zip(params, states, strict=True):
                tensors = map(local_part, (param, param.grad, state["exp_avg"], state["exp_avg_sq"]))
                copy = cast_copy(param)
                triton_adam.update_(
                    *tensors, copy and copy.tensor, step=state["step"], factor=factor, of=of
                )
                if copy is None:
                    increment_version(param)  # kernels of our own do not
                else:
                    copy.written()


class FusedAdam(FusedAdamW):
    """torch.optim.Adam, whose weight decay is part of the gradient."""

    decoupled = False


def takes(params: list[nn.Parameter]) -> bool:
    """Whether the kernel can update them: it reads memory, which torchao's wrappers of weights have not."""
    return all(
        is_plain(part)
        and part.is_cuda
        and part.dtype == torch.float32
        and part.is_contiguous()
        for part in map(local_part, params)
    )
