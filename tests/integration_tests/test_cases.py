"""Does every layout, started as a user starts it, draw the loss curve of one process?"""

import pytest

from tests.integration_tests.cases import CASES, REFERENCE
from tests.integration_tests.run_tests import assert_same_curve, run_case


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[float]:
    return run_case(REFERENCE, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.test_name)
def test_case(case, reference, tmp_path):
    assert_same_curve(run_case(case, tmp_path), reference)
