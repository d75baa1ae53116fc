"""How many ranks each kind of parallelism gets, and the DeviceMesh that follows."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import Parallelism, Training

_REPLICATE = "parallelism.data_parallel_replicate_degree"
_SHARD = "parallelism.data_parallel_shard_degree"


@dataclass(frozen=True)
class Degrees:
    """Ranks along each mesh axis; their product is the world size."""

    dp_replicate: int
    dp_shard: int

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
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        if world_size % replicate:
            raise ConfigError([_not_a_divisor(_REPLICATE, replicate, world_size, divisors)])
        left = world_size // replicate
        if shard == -1:
            shard = left
        if shard != left:
            reason = f"{replicate} replicas of {shard} shards do not make {world_size} ranks."
            raise ConfigError([Fault(_SHARD, reason, f"Use {left}, or -1.", value=shard)])
        return cls(replicate, shard)

    def mesh(self, device_type: str) -> DeviceMesh:
        """The dense layers' mesh, axes dp_replicate and dp_shard."""
        shape = (self.dp_replicate, self.dp_shard)
        return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def _not_a_divisor(setting: str, value: int, world_size: int, divisors: list[int]) -> Fault:
    nearest = sorted(sorted(divisors, key=lambda n: abs(n - value))[:2])
    remedy = f"Use {' or '.join(map(str, nearest))}."
    return Fault(setting, f"does not divide the {world_size} ranks.", remedy, value=value)


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
