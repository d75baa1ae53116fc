"""Does every layout and option, run as a user runs it, draw the loss curve of one process?"""

from pathlib import Path

import pytest

from tests.integration_tests.cases import MODELS, SUITES
from tests.integration_tests.run_tests import assert_same_curve, reference, run_case

CASES = [case for cases in SUITES.values() for case in cases]


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> Path:
    """A folder for the runs of one process: one a model."""
    return tmp_path_factory.mktemp("references")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.test_name)
def test_case(case, references, tmp_path):
    found = run_case(case, tmp_path)
    assert_same_curve(found, reference(case.model, references), case.tolerance)


def test_suites_are_whole():
    names = [case.test_name for case in CASES]
    assert len(names) == len(set(names)) >= 60
    assert {case.model for case in CASES} == set(MODELS)
    assert sum(case.launched for case in CASES) >= 6
