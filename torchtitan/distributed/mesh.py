"""How many ranks each kind of parallelism gets, and the DeviceMeshes that follow."""

import math
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.near_numbers import nearest_divisors
from torchtitan.config.schema import Parallelism

_REPLICATE = "parallelism.data_parallel_replicate_degree"
_SHARD = "parallelism.data_parallel_shard_degree"
_CONTEXT = "parallelism.context_parallel_degree"
_PIPELINE = "parallelism.pipeline_parallel_degree"
_TENSOR = "parallelism.tensor_parallel_degree"
_EXPERT = "parallelism.expert_parallel_degree"


@dataclass(frozen=True)
class Meshes:
    """The same ranks, seen from the dense layers and from the experts."""

    dense: DeviceMesh
    """Axes pp, dp_replicate, fsdp, tp; fsdp is dp_shard * cp, as both shard parameters."""
    experts: DeviceMesh | None
    """Axes pp, dp_replicate, efsdp, ep, etp; None where experts live on the dense mesh (ep = 1)."""
    cp: DeviceMesh | None
    """The one axis cp: ranks that share sequences; None where each has whole ones."""


@dataclass(frozen=True)
class Degrees:
    """Ranks along each mesh axis; pp * dp_replicate * dp_shard * cp * tp is the world size.

    Experts regroup the ranks of one replica of a stage: ep * etp of them hold a layer's experts once.
    """

    dp_replicate: int
    dp_shard: int
    tp: int
    ep: int = 1
    etp: int = 1
    """Ranks that each expert is split over; the tensor-parallel degree where ep = 1."""
    cp: int = 1
    pp: int = 1

    @property
    def dp(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def token_copies(self) -> int:
        """Ranks that are given the same tokens."""
        return self.pp * self.tp

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage: consecutive ones."""
        return self.dp * self.cp * self.tp

    @classmethod
    def resolve(cls, config: Parallelism, world_size: int) -> "Degrees":
        """The degrees `config` asks for on `world_size` ranks; -1 shards over what is left.

        Raises ConfigError where they do not multiply to the world size.
        """
        replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
        tp, cp = config.tensor_parallel_degree, config.context_parallel_degree
        pp = config.pipeline_parallel_degree
        inner = ((_PIPELINE, pp), (_TENSOR, tp), (_CONTEXT, cp))
        left = world_size
        for setting, degree in (*inner, (_REPLICATE, replicate)):
            if left % degree:
                enough = pp * tp * cp * replicate * max(1, shard)
                raise ConfigError([_not_a_divisor(setting, degree, left, world_size, enough)])
            left //= degree
        if shard not in (-1, left):
            split = f"{cp} context-parallel times {tp}" if cp > 1 else f"{tp}"
            stages = f"{pp} pipeline ranks times " if pp > 1 else ""
            reason = (
                f"{stages}{replicate} replicas of {shard} shards of {split} tensor-parallel ranks do "
                f"not make {world_size} ranks."
            )
            raise ConfigError([Fault(_SHARD, reason, f"Use {left}, or -1.", value=shard)])
        ep = config.expert_parallel_degree
        etp = tp if ep == 1 else config.expert_tensor_parallel_degree
        places = left * cp * tp // etp
        if places % ep:
            enough = math.lcm(world_size, world_size // places * ep) if shard == -1 else 0
            raise ConfigError([_not_a_divisor(_EXPERT, ep, places, world_size, enough)])
        return cls(replicate, left, tp, ep, etp, cp, pp)

    def slots(self, rank: int, num_slots: int) -> range:
        """Which of the global batch's sequences a rank serves; pp, cp and tp neighbours share them."""
        share = num_slots // self.dp
        first = rank % self.stage_size // (self.cp * self.tp) * share
        return range(first, first + share)

    def route_own_tokens(self, sequence_parallel: bool) -> bool:
        """Whether each tensor-parallel rank routes its own part of the sequence through MoE layers.

        It can where sequences are split and every expert is whole on one rank; otherwise the ranks of
        a tensor-parallel group take all its tokens, and their outputs add up.
        """
        return sequence_parallel and self.ep > 1 and self.etp == 1

    def routing_copies(self, sequence_parallel: bool) -> int:
        """Ranks of a tensor-parallel group that route the same tokens: one, or all of them."""
        return 1 if self.route_own_tokens(sequence_parallel) else self.tp

    def meshes(self, device_type: str) -> Meshes:
        """The ranks as DeviceMeshes; neighbouring ranks share tp, then cp, or ep; pp comes last."""
        fsdp = self.dp_shard * self.cp
        dense = init_device_mesh(
            device_type,
            (self.pp, self.dp_replicate, fsdp, self.tp),
            mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"),
        )
        cp = None
        if self.cp > 1:
            shape = (self.pp * self.dp, self.cp, self.tp)
            cp = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "cp", "tp"))["cp"]
        if self.ep == 1:
            return Meshes(dense, None, cp)
        efsdp = fsdp * self.tp // (self.ep * self.etp)
        experts = init_device_mesh(
            device_type,
            (self.pp, self.dp_replicate, efsdp, self.ep, self.etp),
            mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep", "etp"),
        )
        return Meshes(dense, experts, cp)


def _not_a_divisor(setting: str, value: int, ranks: int, world_size: int, enough: int) -> Fault:
    """A degree that does not divide `ranks` of the world's; a world of `enough` would do."""
    more = f", or start {enough} ranks, as NGPU={enough} ./run_train.sh does" if enough > world_size else ""
    remedy = f"Use {nearest_divisors(ranks, value)}{more}."
    left = f"the {ranks} that other degrees leave of {world_size}"
    whose = f"the {ranks} ranks there are" if ranks == world_size else left
    return Fault(setting, f"does not divide {whose}.", remedy, value=value)
