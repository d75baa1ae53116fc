"""How many ranks each kind of parallelism gets, and the DeviceMesh that follows."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import Parallelism, Training

_REPLICATE = "parallelism.data_parallel_replicate_degree"
_SHARD = "parallelism.data_parallel_shard_degree"
_TENSOR = "parallelism.tensor_parallel_degree"


@dataclass(frozen=True)
class Degrees:
    """Ranks along each mesh axis; their product is the world size."""

    dp_replicate: int
    dp_shard: int
    tp: int

    @property
    def dp(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    @classmethod
    def resolve(cls, config: Parallelism, world_size: int) -> "Degrees":
        """The degrees `config` asks for on `world_size` ranks; -1 shards over what is left.

        Raises ConfigError where they do not multiply to the world size.
        """
        replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
        tp = config.tensor_parallel_degree
        left = world_size
        for setting, degree in ((_TENSOR, tp), (_REPLICATE, replicate)):
            if left % degree:
                raise ConfigError([_not_a_divisor(setting, degree, left)])
            left //= degree
        if shard not in (-1, left):
            reason = (
                f"{replicate} replicas of {shard} shards of {tp} tensor-parallel ranks do not make "
                f"{world_size} ranks."
            )
            raise ConfigError([Fault(_SHARD, reason, f"Use {left}, or -1.", value=shard)])
        return cls(replicate, left, tp)

    def slots(self, rank: int, num_slots: int) -> range:
        """Which of the global batch's sequences a rank serves; tensor-parallel ranks share theirs."""
        share = num_slots // self.dp
        first = rank // self.tp * share
        return range(first, first + share)

    def mesh(self, device_type: str) -> DeviceMesh:
        """The dense layers' mesh, axes dp_replicate, dp_shard and tp."""
        axes = ("dp_replicate", "dp_shard", "tp")
        shape = (self.dp_replicate, self.dp_shard, self.tp)
        return init_device_mesh(device_type, shape, mesh_dim_names=axes)


def _not_a_divisor(setting: str, value: int, ranks: int) -> Fault:
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    nearest = sorted(sorted(divisors, key=lambda n: abs(n - value))[:2])
    remedy = f"Use {' or '.join(map(str, nearest))}."
    return Fault(setting, f"does not divide the {ranks} ranks there are.", remedy, value=value)


def global_batch_size(config: Training, dp: int) -> int:
    """Sequences an optimizer step takes, over all ranks and microbatches.

    -1 means one microbatch a rank. Raises ConfigError where ranks would get unequal shares.
    """
    step = config.local_batch_size * dp
    size = config.global_batch_size
    if size == -1:
        return step
    if size % step:
        near = [n for n in (size // step * step, (size // step + 1) * step) if n > 0]
        reason = (
            f"does not divide into microbatches of training.local_batch_size = "
            f"{config.local_batch_size} on {dp} data-parallel ranks."
        )
        remedy = f"Use {' or '.join(map(str, near))}."
        raise ConfigError([Fault("training.global_batch_size", reason, remedy, value=size)])
    return size
