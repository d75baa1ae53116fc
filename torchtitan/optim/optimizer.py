"""How the optimizer is built, by its name; its state is complete from the first step on."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim import Adam, AdamW

from torchtitan.config.schema import Optimizer as OptimizerConfig
from torchtitan.distributed.local_parts import by_mesh
from torchtitan.optim.fused_adam import FusedAdam, FusedAdamW, takes
from torchtitan.optim.groups import parameter_groups
from torchtitan.optim.low_precision import LowPrecisionAdamW
from torchtitan.optim.muon import Muon
from torchtitan.optim.state import StateByName

TORCHS = {"Adam": Adam, "AdamW": AdamW}
OURS = {"Adam": FusedAdam, "AdamW": FusedAdamW}


class Optimizers:
    """Optimizers over parameters of their own that are used as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[nn.Parameter, dict]:
        return {param: state for part in self.parts for param, state in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


AnyOptimizer = torch.optim.Optimizer | Optimizers


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AnyOptimizer:
    """Optimizer over the trainable parameters (plain or DTensor), with all of its state allocated.

    Names are the model's own, free of wrapper prefixes: patterns match them, and each group keeps its
    own under "param_names". `dtype` is that of Muon's matrix products; `seed` is of stochastic rounding.
    """
    groups = parameter_groups(named_parameters, config)
    parts = [_build(name, some, config, dtype, seed) for name, some in groups.items()]
    for part in parts:
        if not isinstance(part, FusedAdamW):
            part.register_step_post_hook(_tell_of_change)
    optimizer = parts[0] if len(parts) == 1 else Optimizers(parts)
    set_learning_rate(optimizer, config.lr)
    return optimizer


def _build(
    name: str, groups: list[dict], config: OptimizerConfig, dtype: torch.dtype, seed: int
) -> torch.optim.Optimizer:
    if name == "Muon":
        return Muon(groups, config.lr, config.muon_momentum, config.muon_lr_adjustment, dtype)
    adams = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.uses_torchao:
        return LowPrecisionAdamW(
            groups,
            **adams,
            eight_bit=name == "AdamW8bit",
            stochastic=config.bf16_stochastic_round,
            compiled=config.implementation == "fused",
            seed=seed,
        )
    # Both False is the for-loop; None would let torch choose.
    kernels = {kind: config.implementation == kind for kind in ("fused", "foreach")}
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    classes = OURS if kernels["fused"] and takes(parameters) else TORCHS
    optimizer = classes[name](groups, **adams, **kernels)
    materialize_state(optimizer)
    return optimizer


def _tell_of_change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Copies of weights follow the changes that autograd counts; it does not count torch's fused kernels'."""
    for group in optimizer.param_groups:
        increment_version(group["params"])


@torch.no_grad()
def materialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the zero moments that Adam would make at its first gradient.

    Otherwise one that has had no gradient yet (an expert without tokens) is absent from a
    checkpoint, and a later resume fails on the missing key. Weights are not touched: a step with
    zero gradients would count as a step, and Adam would add its weight decay to the moments.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert not optimizer.state[param], "the optimizer has stepped already"
            # Fused kernels read the step count on the device; the others on the host.
            device = param.device if group["fused"] else "cpu"
            optimizer.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
            }


def take_step(optimizer: AnyOptimizer, factor: torch.Tensor) -> None:
    """Step with gradients times `factor`, a scalar tensor; what they are afterwards is undefined."""
    for part in _parts(optimizer):
        if isinstance(part, FusedAdamW):
            part.gradient_factor = factor.float()
        else:
            _scale_gradients(part, factor)
        part.step()


def _scale_gradients(optimizer: torch.optim.Optimizer, factor: torch.Tensor) -> None:
    """In place, in the parameters' own dtype, which optimizers expect."""
    parameters = [param for group in optimizer.param_groups for param in group["params"]]
    with_grads = [param for param in parameters if param.grad is not None]
    for param in with_grads:
        param.grad = param.grad.to(param.dtype)
    for some in by_mesh([param.grad for param in with_grads], key=lambda grad: grad):
        torch._foreach_mul_(some, factor.to(some[0].device))


def _parts(optimizer: AnyOptimizer) -> Sequence[torch.optim.Optimizer]:
    return optimizer.parts if isinstance(optimizer, Optimizers) else [optimizer]


def set_learning_rate(optimizer: AnyOptimizer, lr: float) -> None:
    """Use `lr` from the next step on, in every group times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def state_by_name(optimizer: AnyOptimizer) -> StateByName:
    """What a checkpoint holds of the optimizer, whatever its grouping is."""
    return StateByName(optimizer.param_groups, optimizer.state)


def describe_optimizer(optimizer: AnyOptimizer) -> str:
    """The groups in a line for the start of a run."""
    return "; ".join(f"{_title(part)}: {_groups(part)}" for part in _parts(optimizer))


def _title(optimizer: torch.optim.Optimizer) -> str:
    if not isinstance(optimizer, LowPrecisionAdamW):
        return type(optimizer).__name__.removeprefix("Fused")
    title = "AdamW8bit" if optimizer.eight_bit else "AdamW"
    return f"{title} with stochastic rounding" if optimizer.stochastic else title


def _groups(optimizer: torch.optim.Optimizer) -> str:
    alike: dict[str, list[torch.Tensor]] = {}  # those of several meshes are groups of their own
    for group in optimizer.param_groups:
        scale = f" and {group['lr_scale']:g} times the learning rate" if group["lr_scale"] != 1 else ""
        alike.setdefault(f"weight decay {group['weight_decay']:g}{scale}", []).extend(group["params"])
    return ", ".join(
        f"{len(tensors)} tensors ({sum(p.numel() for p in tensors):,} parameters) with {settings}"
        for settings, tensors in alike.items()
    )
