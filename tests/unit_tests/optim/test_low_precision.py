"""Moments in 8 bits, weights rounded stochastically: torchao's updates, and nothing lost on the way."""

from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from torchtitan.config.schema import Optimizer
from torchtitan.optim.eight_bit import is_quantized, quantize_
from torchtitan.optim.optimizer import build_optimizer, describe_optimizer, state_by_name
from torchtitan.optim.state import held_tensors

EIGHT = Optimizer(name="AdamW8bit", lr=1e-2, implementation="for-loop")
ROUNDED = Optimizer(lr=1e-2, implementation="for-loop", bf16_stochastic_round=True)
SHAPES = {"large": (64, 96), "odd": (65, 97), "small": (8, 8), "none": (0, 4)}
"""Enough values in whole blocks; not in whole blocks; too few to be quantized; none."""


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for n, shape in SHAPES.items()}


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) * 1e-3
        optimizer.step()
        optimizer.zero_grad()


def torchaos(params, config):
    """Its own optimizer with the settings of a config."""
    from torchao.optim import AdamW8bit, _AdamW

    kind = AdamW8bit if config.name == "AdamW8bit" else _AdamW
    betas, rounds = (config.beta1, config.beta2), config.bf16_stochastic_round
    return kind(
        [param for param in params.values() if param.numel()],
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        bf16_stochastic_round=rounds,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_torchaos(dtype):
    ours, theirs = make(dtype), make(dtype)
    optimizer = build_optimizer(ours.items(), EIGHT)
    train(ours, optimizer, range(4))
    other = torchaos(theirs, EIGHT)
    with torch.compiler.set_stance("force_eager"):
        train(theirs, other, range(4))
    for name, param in theirs.items():
        assert torch.equal(ours[name], param), name
    quantized = {name for name, param in ours.items() if is_quantized(optimizer.state[param]["exp_avg"])}
    assert quantized == {"large"}


def test_compiled_updates_are_those_of_the_loop():
    """Up to a code here and there: a value between two codes may go either way."""
    compiled, loop = ({"w": make()["large"]} for _ in range(2))
    train(compiled, build_optimizer(compiled.items(), replace(EIGHT, implementation="fused")), range(3))
    train(loop, build_optimizer(loop.items(), EIGHT), range(3))
    torch.testing.assert_close(compiled["w"], loop["w"], rtol=0, atol=1e-2 * EIGHT.lr)


def test_quantized_moments_take_a_quarter_of_the_memory():
    large = {"w": make()["large"]}
    eight = sum(t.nbytes for t in held_tensors(build_optimizer(large.items(), EIGHT).state))
    full = sum(t.nbytes for t in held_tensors(build_optimizer(large.items(), Optimizer()).state))
    tables, step = 2 * 256 * 4, 4
    num = large["w"].numel()
    assert full == 2 * 4 * num + step
    assert eight == 2 * num + 2 * 4 * num // 256 + tables + step


@pytest.mark.parametrize("signed", [True, False], ids=["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("power", range(-16, 3, 2))
def test_decoded_values_are_quantized_to_themselves(signed, power):
    from torchao.optim.subclass_8bit import OptimState8bit

    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(power + 20))
    values[1], values[2], values[3, ::2], values[4] = 0.0, -values[2].abs(), 0.0, values[4].abs()
    values *= 10.0**power
    values = values if signed else values.square()
    moment, again = (OptimState8bit.zeros(values.shape, signed, 256) for _ in range(2))
    moment.copy_(values)
    decoded = moment.dequantize()
    quantize_(again, decoded)
    assert torch.equal(again.dequantize(), decoded)
    quantize_(again, values)  # values of no moment go where torchao would put them
    assert torch.equal(again.dequantize(), decoded)


def test_a_saved_state_is_the_state_bit_for_bit(tmp_path):
    whole, stopped, resumed = make(), make(), make()
    optimizer = build_optimizer(whole.items(), EIGHT)
    train(whole, optimizer, range(6))
    first = build_optimizer(stopped.items(), EIGHT)
    train(stopped, first, range(3))
    dcp.save({"optimizer": dict(state_by_name(first))}, checkpoint_id=tmp_path)
    second = build_optimizer(resumed.items(), EIGHT)
    state = state_by_name(second)
    loaded = dict(state)
    dcp.load({"optimizer": loaded}, checkpoint_id=tmp_path)
    state.update(loaded)
    for name, param in stopped.items():
        resumed[name].data.copy_(param)
    train(resumed, second, range(3, 6))
    for name, moments in state_by_name(optimizer).items():
        assert torch.equal(resumed[name], whole[name]), name
        for key, value in moments.items():
            assert torch.equal(state_by_name(second)[name][key], value), (name, key)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [("AdamW", "AdamW8bit"), ("AdamW8bit", "AdamW")])
def test_adamw_goes_on_in_8_bits_and_back(tmp_path, saved_by, loaded_by):
    params = make()
    first = build_optimizer(params.items(), replace(EIGHT, name=saved_by))
    train(params, first, range(3))
    saved = dict(state_by_name(first))
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    second = build_optimizer(params.items(), replace(EIGHT, name=loaded_by))
    loaded = dict(state_by_name(second))
    dcp.load({"optimizer": loaded}, checkpoint_id=tmp_path)
    state_by_name(second).update(loaded)
    for name, moments in state_by_name(second).items():
        for key, value in moments.items():
            error = (value - saved[name][key]).norm() / saved[name][key].norm().clamp(min=1e-30)
            assert error < (0.02 if name == "large" and loaded_by == "AdamW8bit" else 1e-30)


def test_the_state_of_a_parameter_is_always_there():
    state = state_by_name(build_optimizer(make().items(), EIGHT))
    assert set(state) == set(SHAPES) and len(state) == 4
    assert "large" in state and "other" not in state
    with pytest.raises(TypeError, match="no state for large"):
        del state["large"]


def test_rounding_is_right_on_average_and_goes_to_neighbours():
    """A weight of 1 whose updates are 1/16 of the way to the next number in bfloat16."""
    step = 2.0**-8 / 16
    params = {"w": nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))}
    config = replace(ROUNDED, lr=step, weight_decay=0.0, beta1=0.0, beta2=0.0, eps=0.0)
    optimizer = build_optimizer(params.items(), config, seed=3)
    params["w"].grad = torch.ones_like(params["w"])
    optimizer.step()
    assert set(params["w"].tolist()) == {1.0, 1.0 - 2.0**-8}
    assert params["w"].float().mean().item() == pytest.approx(1 - step, abs=4 * 2.0**-8 * 0.25 / 64)
    to_nearest = {"w": nn.Parameter(torch.ones(8, dtype=torch.bfloat16))}
    to_nearest["w"].grad = torch.ones_like(to_nearest["w"])
    build_optimizer(to_nearest.items(), replace(config, bf16_stochastic_round=False)).step()
    assert to_nearest["w"].tolist() == [1.0] * 8


def rounded(seed, steps, config=ROUNDED, params=None):
    params = params or make(torch.bfloat16)
    optimizer = build_optimizer(params.items(), config, seed=seed)
    train(params, optimizer, steps)
    return params, optimizer


@pytest.mark.parametrize(
    "config", [ROUNDED, replace(EIGHT, bf16_stochastic_round=True)], ids=["AdamW", "AdamW8bit"]
)
def test_draws_follow_from_seed_parameter_and_step(config):
    whole, _ = rounded(1, range(4), config)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stopped, optimizer = rounded(1, range(2), config)
    assert torch.equal(torch.rand(3), expected)  # others' numbers are not touched
    resumed = build_optimizer(stopped.items(), config, seed=1)
    state_by_name(resumed).update(dict(state_by_name(optimizer)))
    train(stopped, resumed, range(2, 4))
    other, _ = rounded(2, range(4), config)
    for name in ("large", "odd", "small"):
        assert torch.equal(stopped[name], whole[name])
        assert not torch.equal(other[name], whole[name])


def test_parameters_draw_apart():
    params = {name: nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for name in ("a", "b")}
    for param in params.values():
        param.grad = torch.ones_like(param)
    build_optimizer(params.items(), replace(ROUNDED, lr=2.0**-9)).step()
    assert not torch.equal(params["a"], params["b"])


def test_steps_draw_apart():
    """The same weight, gradient and moments' ratio twice: bits used again would round the same way."""
    param = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    config = replace(ROUNDED, lr=2.0**-9, weight_decay=0.0, beta1=0.0, beta2=0.0, eps=0.0)
    optimizer, found = build_optimizer([("w", param)], config), []
    for _ in range(2):
        param.data.fill_(1.0)
        optimizer.step()
        found.append(param.tolist())
    assert all(set(after) == {1.0, 1.0 - 2.0**-8} for after in found)
    assert found[0] != found[1]


def test_what_is_used_is_told():
    params = {"w": make(torch.bfloat16)["large"]}
    config = replace(EIGHT, bf16_stochastic_round=True)
    line = "AdamW8bit with stochastic rounding: 1 tensors (6,144 parameters) with weight decay 0.1"
    assert describe_optimizer(build_optimizer(params.items(), config)) == line
