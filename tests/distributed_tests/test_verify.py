"""The oracle passes layouts that are right, and names the parameter of one that is wrong."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.data.batch import batch_hash
from torchtitan.data.loader import DataConfig, build_loader
from torchtitan.data.tokenizer import build_tokenizer
from torchtitan.verify import main, summary, verify
from torchtitan.verify_case import settle

TP2 = "--parallelism.tensor_parallel_degree=2"
HSDP = "--parallelism.data_parallel_replicate_degree=2"
SHARD1 = "--parallelism.data_parallel_shard_degree=1"
CP2 = "--parallelism.context_parallel_degree=2"
HEADS = "--parallelism.context_parallel_method=heads"
NO_SP = "--parallelism.no_enable_sequence_parallel"
PP2 = "--parallelism.pipeline_parallel_degree=2"
V = "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"
COMMON = ["--model.flavor=debugmodel", "--model.overrides.n_layers=2"]


@pytest.mark.parametrize(
    "argv",
    [
        [HSDP, "--training.global_batch_size=64"],
        [TP2, SHARD1, NO_SP, "--model.flavor=debugmodel_flex_attn", "--training.seq_len=7"],
        [TP2, SHARD1, "--model.overrides.enable_weight_tying=true", "--compile.enable"],
        [SHARD1, "--activation_checkpoint.mode=full"],
        [TP2, SHARD1, "--compile.enable", "--activation_checkpoint.mode=memory_budget"],
        [CP2, SHARD1, "--model.flavor=debugmodel_varlen_attn", "--activation_checkpoint.mode=full"],
        [CP2, TP2, SHARD1, HEADS, "--model.flavor=debugmodel_flex_attn"],
        [PP2, SHARD1, "--training.global_batch_size=64", "--model.overrides.enable_weight_tying=true"],
        [PP2, V, "--model.overrides.enable_weight_tying=true"],
    ],
)
def test_right_layouts_pass(argv):
    result = verify(load_config([*COMMON, *argv]))
    assert result.passed, result


@pytest.mark.parametrize("argv", [[TP2], [TP2, SHARD1, NO_SP]])
def test_an_odd_vocabulary_is_split_unevenly(argv):
    result = verify(load_config([*COMMON, *argv, "--model.overrides.vocab_size=2049"]))
    assert result.passed, result
    assert "model.vocab_size: 2049 -> 257" in result.settled


def test_large_layouts_are_cut_down_and_said():
    argv = ["--model.flavor=8B", HSDP, "--parallelism.data_parallel_shard_degree=16", TP2[:-1] + "8"]
    result = verify(load_config(argv))
    assert result.world_size == 8 and result.passed
    assert "parallelism.data_parallel_shard_degree: 16 -> 2" in result.settled
    assert "parallelism.tensor_parallel_degree: 8 -> 2" in result.settled


def test_the_configs_own_data_is_read_as_a_run_reads_it():
    config = load_config([*COMMON, SHARD1, "--training.seq_len=64", "--training.local_batch_size=2"])
    case = settle(config, full=True)
    data = DataConfig("c4_test", num_slots=2, seq_len=64, seed=0)
    expected = next(build_loader(data, build_tokenizer(config.model.hf_assets_path), range(2)))
    assert batch_hash(case.batches[0]) == batch_hash(expected)
    small = settle(config, full=False)
    assert "step 1 trains on training.dataset = 'c4_test' (token ids modulo 256)" in str(small.settled)
    assert torch.equal(small.batches[0].tokens, expected.tokens[:, :32] % 256)


def test_data_that_is_not_here_is_replaced_and_said():
    case = settle(load_config([*COMMON, "--training.dataset=c4"]), full=False)
    assert "in place of the data: training.dataset = \"c4\": is streamed" in str(case.settled)
    lengths = case.batches[0].document_lengths
    assert max(map(len, lengths)) > 1 and {sum(row) for row in lengths} == {32}


def test_many_axes_at_once_are_cut_to_eight_ranks():
    argv = [HSDP, TP2, "--parallelism.context_parallel_degree=4", "--training.seq_len=64"]
    case = settle(load_config([*COMMON, *argv]), full=False)
    assert case.world_size == 8
    assert "parallelism.data_parallel_shard_degree: -1 -> 1" in case.settled
    assert "parallelism.context_parallel_degree: 4 -> 2" in case.settled


def count_places_in_the_part(model):
    """Tokens take their places among the rank's own for those in the sequence."""
    documents = model.documents

    def wrong(*args):
        found = documents(*args)
        own = torch.arange(found.positions.shape[1]).expand_as(found.positions)
        return replace(found, positions=own)

    model.documents = wrong


def see_one_key_too_many(model):
    documents = model.documents

    def wrong(*args):
        found = documents(*args)
        shifted = {p: m | m.roll(1, -1) if m is not None else m for p, m in found.masks.items()}
        return replace(found, masks=shifted)

    model.documents = wrong


def keep_gradients_of_keys(model):
    """Each rank keeps to itself what its queries say of other ranks' keys."""
    core = model.layers["0"].attention.core
    wrong = replace(core, attend=lambda q, k, v, *rest: core.attend(q, k.detach(), v, *rest))
    model.layers["0"].attention.core = wrong


@pytest.mark.parametrize(
    "sabotage", [count_places_in_the_part, see_one_key_too_many, keep_gradients_of_keys]
)
def test_broken_context_parallelism_is_caught(sabotage):
    result = verify(load_config([*COMMON, CP2, SHARD1]), sabotage=sabotage)
    assert not result.passed
    wrong = {row.name for row in result.rows if not row.passed}
    assert "layers.0.attention.wk.weight" in wrong


def double_a_gradient(model):
    layer = model.layers["1"].attention.wk
    hooked = set()

    def hook(module, inputs):
        if id(module.weight) not in hooked and module.weight.requires_grad:
            hooked.add(id(module.weight))
            module.weight.register_hook(lambda gradient: 2 * gradient)

    layer.register_forward_pre_hook(hook)


def skip_a_reduction(model):
    """The replicas of one layer never add up their gradients."""
    group = model.layers["0"]._get_fsdp_state()._fsdp_param_group

    class Deaf(type(group)):
        all_reduce_grads = property(lambda self: False, lambda self, value: None)

    group.__class__ = Deaf


def shift_a_shard(model):
    with torch.no_grad():
        local = model.layers["1"].feed_forward.w2.weight.to_local()
        local.copy_(local.roll(1, 0))


@pytest.mark.parametrize(
    ("sabotage", "argv", "name"),
    [
        (double_a_gradient, [TP2], "layers.1.attention.wk.weight"),
        (double_a_gradient, [SHARD1, HSDP], "layers.1.attention.wk.weight"),
        (skip_a_reduction, [SHARD1, HSDP], "layers.0.feed_forward.w1.weight"),
        (shift_a_shard, [TP2], "layers.1.feed_forward.w2.weight"),
    ],
)
def test_broken_layouts_are_caught_by_name(sabotage, argv, name):
    result = verify(load_config([*COMMON, *argv]), sabotage=sabotage)
    assert not result.passed
    assert name in [row.name for row in result.rows if not row.passed]
    if sabotage is double_a_gradient:
        first = next(row for row in result.rows if row.name == name)
        assert first.norm_ratio == pytest.approx(2.0, rel=1e-3)


def poison_a_gradient(model):
    def hook(module, inputs):
        if module.weight.requires_grad:
            module.weight.register_hook(lambda gradient: gradient * float("nan"))

    model.layers["1"].attention.wk.register_forward_pre_hook(hook)


@pytest.mark.parametrize("argv", [[SHARD1], [SHARD1, HSDP]], ids=["one rank", "two ranks"])
def test_a_gradient_of_nan_is_no_small_error(argv):
    result = verify(load_config([*COMMON, *argv]), sabotage=poison_a_gradient)
    [row] = [row for row in result.rows if "layers.1.attention.wk" in row.name]
    assert not result.passed and not row.passed and row.error == float("inf")


MOE = [
    "--model.name=deepseek_v3",
    "--parallelism.tensor_parallel_degree=2",
    "--parallelism.expert_parallel_degree=2",
    "--moe.sequence_balance_coeff=0.1",
    "--moe.global_balance_coeff=0.1",
    "--moe.router_z_coeff=0.01",
]


def favour_an_expert(model):
    """One rank of a router that should be the same everywhere."""
    router = model.layers["1"].moe.router
    compute = router._logits
    if dist.get_rank() == 1:
        router._logits = lambda x: compute(x) + torch.eye(8)[3]


def count_twice(model):
    def hook(layer, inputs, output):
        layer.tokens_per_expert.mul_(2)

    model.layers["1"].moe.register_forward_hook(hook)


@pytest.mark.parametrize("argv", [[], [NO_SP, "--activation_checkpoint.mode=full"], [CP2]])
def test_routing_and_load_are_those_of_one_process(argv):
    result = verify(load_config([*COMMON, *MOE, SHARD1, *argv]))
    assert result.passed, result
    (layer,) = result.routing  # the other one is dense
    assert layer.choices and not layer.flips


def test_routing_in_a_pipeline_is_that_of_one_process():
    argv = ["--model.overrides.n_layers=4", "--training.global_batch_size=64", PP2, V, *MOE]
    result = verify(load_config([*COMMON, *argv, SHARD1, "--activation_checkpoint.mode=full"]))
    assert result.passed, result
    assert len(result.routing) == 4 and all(layer.choices for layer in result.routing)


@pytest.mark.parametrize("sabotage", [favour_an_expert, count_twice])
def test_broken_routing_is_caught_by_name(sabotage):
    result = verify(load_config([*COMMON, *MOE, SHARD1]), sabotage=sabotage)
    assert [layer.name for layer in result.routing if not layer.passed] == ["layers.1.moe"]
    assert "layers.1.moe" in summary(result).splitlines()[-1]


def test_odd_lengths_are_refused_with_sequence_parallelism_only():
    argv = [*COMMON, TP2, "--training.seq_len=7"]
    with pytest.raises(ConfigError, match=r"seq_len = 7.*degree = 2.*Use 6 or 8, or set"):
        verify(load_config(argv))


def test_exit_status_and_json(tmp_path, capsys):
    file = tmp_path / "new" / "report.json"
    assert main([*COMMON, SHARD1, HSDP, "--verify.json", str(file)]) == 0
    assert "EQUAL to one process" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["passed"] and content["world_size"] == 2
    assert len(content["peak_mib"]) == 2 and min(content["peak_mib"]) > 50
    assert {"name", "error", "norm_ratio", "replicas_equal", "tolerance"} == set(content["rows"][0])
    assert main([*COMMON, "--model.flavor=nonsense"]) == 2
    assert main([*COMMON, "--verify.json"]) == 2
