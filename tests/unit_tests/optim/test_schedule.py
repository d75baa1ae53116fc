"""The learning rate: the curve's corners, its shape between them, and what must not change it."""

import math
from itertools import pairwise, product

import pytest

from torchtitan.config.schema import LRScheduler
from torchtitan.optim.schedule import describe_schedule, learning_rate

LR = 2e-3
DECAY_TYPES = ("linear", "sqrt", "cosine")
CURVES = [
    LRScheduler(warmup_steps=warmup, decay_ratio=ratio, decay_type=kind, min_lr_factor=floor)
    for warmup, ratio, kind, floor in product(
        (0, 1, 7, 19, 20, 21), (None, 0.0, 0.3, 1.0), DECAY_TYPES, (0.0, 0.1)
    )
]


def curve(scheduler: LRScheduler, total_steps: int, last: int | None = None) -> list[float]:
    return [
        learning_rate(s, LR, scheduler, total_steps) for s in range(1, (last or total_steps) + 1)
    ]


def test_warm_up_rises_in_equal_parts_from_the_first_step():
    scheduler = LRScheduler(warmup_steps=4, decay_ratio=0.0)
    assert curve(scheduler, 6) == pytest.approx([LR / 4, LR / 2, 3 * LR / 4, LR, LR, LR])


def test_by_default_decay_follows_warm_up_and_the_last_step_still_learns():
    # 2 warm-up steps, 4 decay steps towards 0, which the step after the last one would have.
    got = curve(LRScheduler(warmup_steps=2), 6, last=8)
    assert got == pytest.approx([LR * f for f in (1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4, 0, 0)])


@pytest.mark.parametrize(
    ("kind", "halfway"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)]
)
def test_decay_shapes_with_a_floor(kind, halfway):
    scheduler = LRScheduler(warmup_steps=0, decay_ratio=0.4, decay_type=kind, min_lr_factor=0.2)
    # The decay spans 4 of 10 steps: it begins after step 7, is half done at 9 and done at 11.
    got = {s: learning_rate(s, LR, scheduler, 10) / LR for s in (7, 9, 11, 50)}
    assert got == pytest.approx({7: 1.0, 9: 0.2 + 0.8 * halfway, 11: 0.2, 50: 0.2})


@pytest.mark.parametrize("scheduler", CURVES, ids=str)
def test_every_curve_rises_once_then_never_again_within_its_bounds(scheduler):
    rates = curve(scheduler, 20, last=30)
    peak = min(scheduler.warmup_steps, 20) or 1
    assert rates[peak - 1] == max(rates) == LR
    assert all(a < b for a, b in pairwise(rates[:peak]))
    assert all(a >= b for a, b in pairwise(rates[peak - 1 :]))
    assert min(rates[:20]) > 0
    assert rates[-1] >= LR * scheduler.min_lr_factor


@pytest.mark.parametrize("kind", DECAY_TYPES)
def test_long_curves_have_no_jump_except_the_steep_start_of_sqrt(kind):
    rates = curve(LRScheduler(warmup_steps=100, decay_ratio=0.5, decay_type=kind), 1000)
    largest = max(abs(a - b) for a, b in pairwise(rates)) / LR
    assert largest <= (math.sqrt(1 / 500) if kind == "sqrt" else 1 / 100) + 1e-12


@pytest.mark.parametrize("steps", [3, 20, 500])
def test_the_length_of_a_run_does_not_alter_a_schedule_with_its_own_length(steps):
    scheduler = LRScheduler(warmup_steps=5, total_steps=20)
    assert curve(scheduler, steps, last=25) == curve(scheduler, 20, last=25)


def test_warm_up_longer_than_the_run_is_cut_to_it_and_said():
    scheduler = LRScheduler(warmup_steps=200)
    assert curve(scheduler, 10) == pytest.approx([LR * s / 10 for s in range(1, 11)])
    assert "lr_scheduler.warmup_steps = 200 is cut" in describe_schedule(LR, scheduler, 10)


def test_description_gives_the_phases_and_a_run_beyond_the_schedule():
    scheduler = LRScheduler(warmup_steps=10, total_steps=100, decay_ratio=0.2, min_lr_factor=0.1)
    assert describe_schedule(LR, scheduler, 120) == (
        "learning rate 0.002 over 100 steps: warm-up 10, constant 70, linear decay 20 to 0.0002; "
        "training.steps = 120 goes on at the last value"
    )
