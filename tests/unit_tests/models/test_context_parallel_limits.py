"""Lengths and heads that ranks cannot share are refused before a run, with the nearest that work."""

import pytest

from torchtitan.config.checks import check_config
from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.distributed.mesh import Degrees
from torchtitan.models.registry import model_config

CP = "--parallelism.context_parallel_degree"
TP = "--parallelism.tensor_parallel_degree"
HEADS = "--parallelism.context_parallel_method=heads"
PLAIN = "--parallelism.context_parallel_load_balancer=None"
NO_SP = "--parallelism.no_enable_sequence_parallel"


def faults(line):
    config = load_config(["--training.seq_len=2048", *line.split()])
    try:
        model_config("llama3", config.model.flavor, {}).update_from_config(config)
    except ConfigError as error:
        return {fault.setting: f"{fault.reason} {fault.remedy}" for fault in error.faults}
    return {}


@pytest.mark.parametrize(
    ("line", "unit"),
    [
        (f"{CP}=2", 4),
        (f"{CP}=2 {PLAIN}", 2),
        (f"{CP}=2 {HEADS}", 2),
        (f"{CP}=4 {TP}=2", 8),
        (f"{CP}=2 {TP}=4", 8),
        (f"{CP}=2 {TP}=4 {NO_SP}", 4),
        (f"{CP}=2 {TP}=4 {PLAIN}", 8),
    ],
)
def test_lengths_divide_into_equal_pieces(line, unit):
    assert not faults(f"{line} --training.seq_len={3 * unit}")
    for key in ("training", "validation"):
        text = faults(f"{line} --validation.enable --{key}.seq_len={3 * unit + 1}")[f"{key}.seq_len"]
        assert f"must divide by {unit}." in text
        assert text.endswith(f"Use {3 * unit} or {4 * unit}.")


def test_turning_sequence_parallelism_off_is_advised_where_it_helps():
    assert "Use 16 or 24, or set parallelism.enable_seq" in faults(
        f"{CP}=2 {TP}=4 --training.seq_len=20"
    )["training.seq_len"]


def test_heads_are_exchanged_in_equal_shares():
    assert not faults(f"--model.flavor=8B {CP}=4 {TP}=2 {HEADS}")
    assert not faults(f"--model.flavor=8B {CP}=8 {TP}=2")
    text = faults(f"--model.flavor=8B {CP}=8 {TP}=2 {HEADS}")["parallelism.context_parallel_degree"]
    assert text == (
        "does not divide the 4 key/value heads of a tensor-parallel rank (2 share the model's). "
        'Use 2 or 4, or set parallelism.context_parallel_method = "kv".'
    )


def test_a_way_to_exchange_keys_means_nothing_where_heads_are():
    argv = [f"{CP}=2", HEADS, "--parallelism.context_parallel_rotate_method=alltoall"]
    (fault,) = check_config(load_config(argv))
    assert fault.setting == "parallelism.context_parallel_rotate_method"


def test_ranks_of_all_degrees_make_the_world():
    def resolve(line, world_size):
        return Degrees.resolve(load_config(line.split()).parallelism, world_size)

    degrees = resolve(f"{CP}=2 {TP}=2 --parallelism.expert_parallel_degree=8", 16)
    assert (degrees.dp_shard, degrees.cp, degrees.dp) == (4, 2, 4)
    assert [degrees.slots(rank, 8).start for rank in range(16)] == [r // 4 * 2 for r in range(16)]
    with pytest.raises(ConfigError, match="does not divide the 8 ranks there are. Use 2 or 4"):
        resolve(f"{CP}=3", 8)
    expert = "--parallelism.expert_parallel_degree"
    for line, world, use, enough in (
        (f"{TP}=2", 1, "1", 2),
        (f"{TP}=2 {CP}=2", 2, "1", 4),
        (f"{expert}=2", 1, "1", 2),
        (f"{TP}=3 {expert}=4", 3, "1 or 3", 12),
    ):
        more = f"Use {use}, or start {enough} ranks, as NGPU={enough} ./run_train.sh does."
        with pytest.raises(ConfigError, match=more):
            resolve(line, world)
        resolve(line, enough)
    wrong = f"{CP}=2 {TP}=2 --parallelism.data_parallel_shard_degree=3"
    with pytest.raises(ConfigError, match="of 2 context-parallel times 2 tensor-parallel .* Use 2"):
        resolve(wrong, 8)
