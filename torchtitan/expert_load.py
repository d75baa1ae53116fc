"""What an optimizer step has to do with how tokens were spread over experts: balance and statistics.

E experts, of all MoE layers alike.
"""

import torch
import torch.distributed as dist
from torch import nn


class ExpertLoad:
    """Counts of tokens by layer and expert over the global batch; moves the balance biases.

    `num_expert_ranks` is the expert-parallel degree, for the load of ranks.
    """

    def __init__(self, model: nn.Module, num_expert_ranks: int):
        self.layers = {
            name.removesuffix(".moe"): layer
            for name, layer in model.named_modules()
            if hasattr(layer, "tokens_per_expert")
        }
        self.num_expert_ranks = num_expert_ranks
        self.counts: torch.Tensor | None = None

    @torch.no_grad()
    def finish_step(self, stepped: bool) -> None:
        """Sum the step's counts over ranks and begin new ones; move the biases if weights moved.

        Each bias goes by `load_balance_coeff` towards the mean load (arXiv 2408.15664): up where an
        expert had too few tokens, down where too many. One all-reduce, no wait for the device.
        """
        if not self.layers:
            return
        layers = self.layers.values()
        counts = torch.stack([layer.tokens_per_expert for layer in layers])
        if dist.is_initialized():
            dist.all_reduce(counts)
        # Some ranks have routed, and counted, the same tokens.
        self.counts = counts // next(iter(layers)).load_copies
        for layer, load in zip(layers, self.counts, strict=True):
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
        by_rank = counts.unflatten(1, (self.num_expert_ranks, -1)).mean(2)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        columns = {
            "max_expert_load": (counts / mean).amax(1),
            "max_rank_load": (by_rank / mean).amax(1),
            "entropy": torch.special.entr(share).sum(1) / torch.tensor(counts.shape[1]).log(),
            "unused_experts": (counts == 0).sum(1),
        }
        biases = [layer.expert_bias for layer in self.layers.values()]
        if all(bias is not None for bias in biases):
            columns["bias_norm"] = torch.stack(biases).norm(dim=1)
        if self.num_expert_ranks > 1:
            columns["received_mib"] = self._peak_received_bytes() / 2**20
        table = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
        return {
            f"moe/{layer}/{column}": value
            for layer, row in zip(self.layers, table, strict=True)
            for column, value in zip(columns, row, strict=True)
        }

    def _peak_received_bytes(self) -> torch.Tensor:
        """By layer, over all ranks; begins anew."""
        dispatchers = [layer.dispatcher for layer in self.layers.values()]
        peaks = self.counts.new_tensor([d.peak_received_bytes for d in dispatchers])
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        for dispatcher in dispatchers:
            dispatcher.peak_received_bytes = 0
        return peaks
