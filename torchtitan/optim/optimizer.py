"""How the optimizer is built: Adam or AdamW, its state complete from the first step on."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Adam, AdamW

from torchtitan.config.schema import Optimizer as OptimizerConfig
from torchtitan.optim.groups import parameter_groups

OPTIMIZERS = {"Adam": Adam, "AdamW": AdamW}


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Optimizer over the trainable parameters (plain or DTensor), with all of its state allocated.

    Names are the model's own, free of wrapper prefixes: `no_decay` patterns match them, and each
    group keeps its own under "param_names". Raises ConfigError if such a pattern matches nothing.
    """
    assert config.name in OPTIMIZERS, f"optimizer {config.name}, known are {list(OPTIMIZERS)}"
    optimizer = OPTIMIZERS[config.name](
        parameter_groups(named_parameters, config.weight_decay, config.no_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        # Both False is the for-loop; None would let torch choose.
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )
    materialize_state(optimizer)
    return optimizer


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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next step on, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """{parameter name: {"step", "exp_avg", "exp_avg_sq"}}, the tensors that the optimizer uses.

    All that a checkpoint needs: a load in place restores the optimizer, whatever its grouping was.
    Learning rate, decay and betas are the config's and so are not part of it.
    """
    return {
        name: optimizer.state[param]
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """The groups in a line for the start of a run."""
    groups = ", ".join(
        f"{len(group['params'])} tensors ({sum(p.numel() for p in group['params']):,} parameters) "
        f"with weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    )
    return f"{type(optimizer).__name__}: {groups}"
