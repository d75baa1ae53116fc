"""The state of an optimizer by parameter name: what checkpoints hold of it, and its size."""

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import nn

from torchtitan.distributed.local_parts import local_part, with_local_part
from torchtitan.optim.eight_bit import is_quantized, quantize_


class StateByName(MutableMapping[str, dict[str, torch.Tensor]]):
    """{parameter name: its state}: "momentum_buffer" in Muon, "step", "exp_avg", "exp_avg_sq" in Adam.

    All that a checkpoint needs; learning rate, decay and betas are the config's and so are not part of
    it. What one gets are the tensors in use, but of quantized state copies in fp32, in host memory and
    distributed as their parameter is, made anew every time. What one sets is copied.
    """

    def __init__(self, param_groups: list[dict], state: Mapping[nn.Parameter, dict]):
        self._params: dict[str, nn.Parameter] = {
            name: param
            for group in param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        }
        self._state = state
        without = [name for name, param in self._params.items() if not state.get(param)]
        assert not without, f"there is no state of {without}"
        tensors = (tensor for param in self._params.values() for tensor in state[param].values())
        self._is_quantized = any(map(is_quantized, tensors))

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        param = self._params[name]
        state = self._state[param]
        if not self._is_quantized:
            return state
        # Also what this rank has not quantized: others may have their parts of it.
        return {key: _values(tensor, param) if tensor.ndim else tensor for key, tensor in state.items()}

    def __setitem__(self, name: str, values: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in self._state[self._params[name]].items():
            put = quantize_ if is_quantized(tensor) else torch.Tensor.copy_
            put(local_part(tensor), local_part(values[key]))

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"the optimizer would have no state for {name}")

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def held_tensors(state: Mapping[nn.Parameter, dict]) -> Iterator[torch.Tensor]:
    """What a rank keeps its part of the state in: of a quantized tensor codes, scales and a table."""
    for tensors in state.values():
        for tensor in map(local_part, tensors.values()):
            parts = tensor.__tensor_flatten__()[0] if is_quantized(tensor) else []
            yield from (getattr(tensor, part) for part in parts) if parts else (tensor,)


@torch.no_grad()
def _values(tensor: torch.Tensor, param: nn.Parameter) -> torch.Tensor:
    local = tensor.dequantize() if is_quantized(tensor) else local_part(tensor).float()
    return with_local_part(param, local).to("cpu")
