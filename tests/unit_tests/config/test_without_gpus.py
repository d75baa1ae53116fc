"""What only GPUs can do is replaced, and said."""

from torchtitan.config.schema import Parallelism
from torchtitan.config.without_gpus import without_gpus


def test_what_only_gpus_do_is_replaced_and_said():
    notes = []
    asked = Parallelism(expert_parallel_degree=2, expert_parallel_comm_backend="symmetric_memory")
    assert without_gpus(asked, notes) == Parallelism(expert_parallel_degree=2)
    assert notes == ["parallelism.expert_parallel_comm_backend: symmetric_memory -> standard"]
    assert without_gpus(Parallelism(), notes) == Parallelism() and len(notes) == 1
