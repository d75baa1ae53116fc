"""Numbers that a remedy names: the nearest two, in ascending order."""

import pytest

from torchtitan.config.near_numbers import nearest_divisors, nearest_multiples, nearest_numbers


@pytest.mark.parametrize(
    ("working", "wanted", "words"),
    [([], 3, ""), ([8], 3, "8"), ([1, 2, 4, 8], 3, "2 or 4"), ([8, 4, 2, 1], 9, "4 or 8")],
)
def test_the_nearest_two_of_those_that_work(working, wanted, words):
    assert nearest_numbers(working, wanted) == words


@pytest.mark.parametrize(("wanted", "words"), [(5, "4 or 6"), (11, "6 or 12"), (13, "6 or 12")])
def test_divisors(wanted, words):
    assert nearest_divisors(12, wanted) == words


@pytest.mark.parametrize(("wanted", "words"), [(3, "4"), (5, "4 or 8"), (7, "4 or 8"), (9, "8 or 12")])
def test_multiples(wanted, words):
    assert nearest_multiples(4, wanted) == words
