"""Muon: updates are running means of gradients, each matrix of them made orthogonal.

Keller Jordan's optimizer (https://kellerjordan.github.io/posts/muon), as in torch.optim.Muon; here also
for matrices that are spread over ranks, and for experts, each of whose matrices is one by itself.
n matrices, r rows, c columns.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan.distributed.local_parts import local_part
from torchtitan.optim.whole_matrices import Cut, cuts_of, on_whole_matrices

NUM_ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial 3.4 x - 4.8 x^3 + 2.0 x^5: steep at 0; five times over, it leads to 0.7 to 1.2."""
LEAST_NORM = 1e-7
MOST_ELEMENTS = 2**26
"""Worked on at a time, where one matrix alone does not have more."""
LR_ADJUSTMENTS = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    # 0.2 is about the root mean square of AdamW's updates: Moonlight, arXiv 2502.16982.
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
"""What the learning rate is multiplied by for a matrix of so many rows and columns."""


class Muon(torch.optim.Optimizer):
    """Muon over parameters (..., r, c), plain or DTensor, each a stack of matrices.

    With m the running mean of gradients g, and O what `orthogonal` makes of each matrix:

        m <- momentum m + (1 - momentum) g
        weight <- (1 - lr weight_decay) weight - lr adjustment O(momentum m + (1 - momentum) g)

    `dtype` is that of the matrix products in O. A step is a collective of the ranks that matrices are
    split over: each works on some of them.
    """

    def __init__(
        self, groups: Iterable[dict], lr: float, momentum: float, lr_adjustment: str, dtype: torch.dtype
    ):
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        self.adjustment, self.dtype = LR_ADJUSTMENTS[lr_adjustment], dtype
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {"momentum_buffer": torch.zeros_like(param)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for params, cuts in _batches(p for p in group["params"] if p.grad is not None):
                means = [self._mean(param, group["momentum"]) for param in params]
                updates = self._orthogonal(torch.cat(means), params[0], cuts)
                for param, update in zip(params, updates.split([len(m) for m in means]), strict=True):
                    weight, lr = local_part(param), group["lr"]
                    weight.mul_(1 - lr * group["weight_decay"])
                    lr *= self.adjustment(*param.shape[-2:])
                    weight.add_(update.to(weight.device).reshape(weight.shape), alpha=-lr)

    def _mean(self, param: nn.Parameter, momentum: float) -> torch.Tensor:
        """(n, r', c'): this rank's part of the mean, one gradient ahead as Nesterov's is."""
        grad, mean = local_part(param.grad), local_part(self.state[param]["momentum_buffer"])
        mean.lerp_(grad, 1 - momentum)
        num_matrices = math.prod(grad.shape[:-2])
        return grad.lerp(mean, momentum).reshape(num_matrices, *grad.shape[-2:]).to(self.dtype)

    def _orthogonal(
        self, means: torch.Tensor, param: nn.Parameter, cuts: list[Cut]
    ) -> torch.Tensor:
        if isinstance(param, DTensor):  # offloaded parameters are not where their mesh is
            means = means.to(param.device_mesh.device_type)
        return on_whole_matrices(orthogonal, means, cuts)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, r, c) with the same singular vectors, and singular values of about one.

    By Newton-Schulz iteration; values below some 1e-3 of the norm remain smaller.
    """
    rows, columns = matrices.shape[1:]
    at_a_time = max(1, MOST_ELEMENTS // max(1, rows * columns))
    return torch.cat([_orthogonal(some) for some in matrices.split(at_a_time)])


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    # Row by row, since CPUs add up many numbers imprecisely.
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=2, keepdim=True), dim=1, keepdim=True)
    x = x / norm.clamp(min=LEAST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _batches(params: Iterable[nn.Parameter]) -> Iterator[tuple[list[nn.Parameter], list[Cut]]]:
    """Parameters of one shape, lying alike; as many at a time as ranks can work on a matrix each."""
    alike: dict[tuple, list[nn.Parameter]] = {}
    for param in params:
        place = (param.device_mesh, param.placements) if isinstance(param, DTensor) else ()
        alike.setdefault((param.shape, param.dtype, *place), []).append(param)
    for same in alike.values():
        cuts = cuts_of(same[0])
        num_ranks = math.prod(cut.size for cut in cuts)
        matrices = math.prod(same[0].shape[:-2])
        num = max(1, num_ranks // max(1, matrices))
        yield from ((same[start : start + num], cuts) for start in range(0, len(same), num))
