"""The all-to-all dispatcher for experts that multiply in float8 or MX formats.

e local experts, R rows received by this rank.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.distributed.expert_parallel.all_to_all import AllToAllTokenDispatcher
from torchtitan.distributed.expert_parallel.exchange import Exchange
from torchtitan.routing import Alignment


class TorchAOTokenDispatcher(AllToAllTokenDispatcher):
    """Fills each local expert's rows up to a multiple of row_alignment, with zeros of score zero.

    That comes after padding and exchange, and is undone by `combine`, which reads the rows that were
    sent and no others. Counts given to the experts include these rows, load statistics do not. With
    exchange_in_float8 rows, and gradients of what experts return, travel to the experts as float8.
    """

    def __init__(
        self,
        ep_mesh: DeviceMesh,
        num_experts: int,
        score_before_experts: bool,
        sp_size: int = 1,
        sp_rank: int = 0,
        *,
        row_alignment: int,
        exchange_in_float8: bool = False,
    ):
        super().__init__(ep_mesh, num_experts, score_before_experts, sp_size, sp_rank)
        self.row_alignment = row_alignment
        self.exchange_in_float8 = exchange_in_float8

    def _arrange(
        self, counts: torch.Tensor, exchange: Exchange
    ) -> tuple[torch.Tensor, Exchange]:
        num_received = sum(exchange.splits.num_received)
        alignment = Alignment.of(counts, num_received, self.row_alignment)
        return alignment.counts, exchange.aligned(alignment)
