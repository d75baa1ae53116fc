"""AdamW that holds less in memory, by torchao: moments in 8 bits, weights rounded stochastically.

Each rank updates its own parts as plain tensors. What is drawn for rounding follows from the seed, the
parameter, its step and which part of it this is: replicas draw the same, and a resume draws on.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily  # no public name in 2.11 and 2.13

from torchtitan.distributed.comm import is_fake
from torchtitan.distributed.local_parts import local_part, place_of
from torchtitan.optim.eight_bit import BLOCK_SIZE, is_quantizable


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW over parameters, plain or DTensor, by torchao's arithmetic: in fp32, one after the other.

    With `eight_bit` moments of parts with enough values are quantized; others have the weights' dtype.
    With `stochastic` weights in bfloat16 are rounded to one of their two neighbours by chance, so that
    on average nothing is lost. `compiled` makes one kernel of each parameter's update.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        eight_bit: bool,
        stochastic: bool,
        compiled: bool,
        seed: int,
    ):
        from torchao.optim.adam import single_param_adam
        from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

        with unset_fake_temporarily():  # tables that are computed once, and not in a dry run's mode
            get_qmap_signed()
            get_qmap_unsigned()
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.eight_bit, self.stochastic, self.seed = eight_bit, stochastic, seed
        self.update, self.around_steps = single_param_adam, nullcontext
        if compiled:
            self.update = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
            # Every shape is compiled, however many there are, as by torchao. No public way in 2.13.
            self.around_steps = torch._dynamo.utils.disable_cache_limit
        for param in self._parameters():
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": self._zeros(param, signed=True),
                "exp_avg_sq": self._zeros(param, signed=False),
            }

    @torch.no_grad()
    def _zeros(self, param: nn.Parameter, signed: bool) -> torch.Tensor:
        """A moment: quantized it is of this rank's part alone, else distributed as its parameter is."""
        from torchao.optim.subclass_8bit import OptimState8bit

        local = local_part(param)
        if not self.eight_bit or not is_quantizable(local):
            return torch.zeros_like(param)
        return OptimState8bit.zeros(local.shape, signed, BLOCK_SIZE, local.device, local.dtype)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        with self.around_steps(), self._own_random_numbers():
            for group in self.param_groups:
                for name, param in zip(group["param_names"], group["params"], strict=True):
                    if param.grad is not None:
                        self._step(name, param, group)

    def _step(self, name: str, param: nn.Parameter, group: Mapping) -> None:
        state, weight = self.state[param], local_part(param)
        state["step"] += 1
        if weight.numel() == 0 or is_fake(weight):  # a dry run draws and compiles nothing
            return
        rounds = self.stochastic and weight.dtype == torch.bfloat16
        if rounds:
            torch.manual_seed(_seed(self.seed, name, int(state["step"]), place_of(param)))
        self.update(
            weight.detach(),
            local_part(param.grad),
            state["step"],
            local_part(state["exp_avg"]),
            local_part(state["exp_avg_sq"]),
            None,
            torch.tensor(group["lr"], dtype=torch.float32),  # a number would be compiled in
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            True,
            rounds,
        )

    def _own_random_numbers(self) -> AbstractContextManager[None]:
        """Leaves the generators of others' numbers as they were."""
        devices = {param.device for param in self._parameters() if param.device.type == "cuda"}
        return torch.random.fork_rng(devices, enabled=self.stochastic)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (param for group in self.param_groups for param in group["params"])


def _seed(*of: object) -> int:
    digest = hashlib.blake2b(repr(of).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds below 2**63
