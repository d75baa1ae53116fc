"""Which steps are skipped, and when a run ends: the same decision from the same numbers."""

import math

import pytest

from torchtitan.config.schema import Training
from torchtitan.optim.nonfinite import NonFinite, NonFiniteGuard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_is_finite_ends_a_row_of_skipped_ones(loss, norm):
    guard = NonFiniteGuard(Training(on_nonfinite="skip", max_skipped_steps=2))
    values = {"bad": (loss, norm), "good": (1.0, 1.0)}
    steps = ("bad", "bad", "good", "bad", "bad")
    taken = [guard.may_step(n, *values[kind]) for n, kind in enumerate(steps)]
    assert taken == [False, False, True, False, False]
    with pytest.raises(NonFinite, match="^step 5: .* after 2 skipped steps"):
        guard.may_step(5, loss, norm)
