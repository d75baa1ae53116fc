"""What an optimizer step has to do with how tokens were spread over experts: balance and statistics.

E experts, of all MoE layers alike.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from torchtitan.config.schema import Parallelism
from torchtitan.distributed.mesh import Degrees
from torchtitan.model_parts import ModelParts
from torchtitan.models.decoder import DecoderConfig


class ExpertLoad:
    """Counts of tokens by layer and expert over the global batch; moves the balance biases.

    All ranks know the counts of all layers, also of those in other stages of a pipeline.
    """

    def __init__(
        self,
        model: ModelParts,
        config: DecoderConfig,
        degrees: Degrees,
        parallelism: Parallelism,
    ):
        self.names = [f"layers.{i}" for i in range(config.n_layers) if config.is_moe_layer(i)]
        self.layers = {
            name.removesuffix(".moe"): layer
            for name, layer in model.named_modules()
            if hasattr(layer, "tokens_per_expert")
        }
        self.degrees = degrees
        # Ranks that route the same tokens also count the same.
        self.copies = degrees.routing_copies(parallelism.enable_sequence_parallel)
        if self.names:
            moe = config.moe
            self.balanced = moe.load_balance_coeff > 0
            self.nothing = torch.zeros(moe.num_experts, dtype=torch.int64, device=model.device)
        self.counts: torch.Tensor | None = None

    @torch.no_grad()
    def finish_step(self, stepped: bool) -> None:
        """Sum the step's counts over ranks and begin new ones; move the biases if weights moved.

        Each bias goes by `load_balance_coeff` towards the mean load (arXiv 2408.15664): up where an
        expert had too few tokens, down where too many. One all-reduce, no wait for the device.
        """
        if not self.names:
            return
        counts = torch.stack(
            [self.layers[n].tokens_per_expert if n in self.layers else self.nothing for n in self.names]
        )
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.counts = counts // self.copies
        for name, layer in self.layers.items():
            load = self.counts[self.names.index(name)]
            layer.tokens_per_expert.zero_()
            if layer.previous_load is not None:
                layer.previous_load.copy_(load)
            load = load.double()
            if layer.expert_bias is not None and stepped:
                layer.expert_bias += layer.config.load_balance_coeff * (load.mean() - load).sign()

    def statistics(self) -> dict[str, float]:
        """Of the last finished step, as moe/<layer>/<name>; collective, waits for the device.

        max_expert_load and max_rank_load are over the mean; entropy is of the shares, over log E;
        unused_experts had no token; bias_norm is the L2 norm of the balance bias, where there is one.
        received_mib, where experts are spread over ranks, is the most that any rank received for one
        forward since the last call.
        """
        if self.counts is None:
            return {}
        counts = self.counts.double()
        mean = counts.mean(1, keepdim=True).clamp(min=1e-9)
        by_rank = counts.unflatten(1, (self.degrees.ep, -1)).mean(2)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        columns = {
            "max_expert_load": (counts / mean).amax(1),
            "max_rank_load": (by_rank / mean).amax(1),
            "entropy": torch.special.entr(share).sum(1) / torch.tensor(counts.shape[1]).log(),
            "unused_experts": (counts == 0).sum(1),
        }
        if self.balanced:
            columns["bias_norm"] = self._largest(lambda layer: layer.expert_bias.norm())
        if self.degrees.ep > 1:
            received = self._largest(lambda layer: layer.dispatcher.peak_received_bytes)
            columns["received_mib"] = received / 2**20
            for layer in self.layers.values():
                layer.dispatcher.peak_received_bytes = 0
        table = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
        return {
            f"moe/{layer}/{column}": value
            for layer, row in zip(self.names, table, strict=True)
            for column, value in zip(columns, row, strict=True)
        }

    def overflow(self) -> str:
        """In words, whether a rank was sent more rows than it has room for; collective.

        Then everything is NaN: the symmetric-memory dispatcher makes it so.
        """
        if not self.names or self.degrees.ep == 1:
            return ""
        shares = self._largest(
            lambda layer: layer.dispatcher.peak_received_bytes / layer.dispatcher.received_bytes_limit
        )
        name, share = max(zip(self.names, shares.tolist(), strict=True), key=lambda pair: pair[1])
        if share <= 1:
            return ""
        return (
            f"{name} sent a rank {share:.2f} times the rows that it has room for: "
            "raise parallelism.symmetric_memory_capacity_factor"
        )

    def _largest(self, value: Callable[[nn.Module], torch.Tensor | int]) -> torch.Tensor:
        """By layer, the largest on any rank; other stages of a pipeline know nothing of a layer."""
        values = torch.zeros(len(self.names), dtype=torch.float64, device=self.nothing.device)
        for name, layer in self.layers.items():
            values[self.names.index(name)] = value(layer)
        if dist.is_initialized():
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values
