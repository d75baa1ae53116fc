"""Values of a frozen config by their dotted names."""

from torchtitan.config.nested import value_at, with_value
from torchtitan.config.schema import JobConfig


def test_a_value_is_changed_and_nothing_else():
    config, key = JobConfig(), "quantize.linear.float8.emulate"
    changed = with_value(config, key, True)
    assert (value_at(config, key), value_at(changed, key)) == (False, True)
    assert with_value(changed, key, False) == config
    assert with_value(config, "training.steps", 3).training.steps == 3
