"""Which numbers that work are nearest to the one that was asked for? In words, for the remedy of a fault."""

from collections.abc import Iterable


def nearest_numbers(working: Iterable[int], wanted: int) -> str:
    """Two of those that work, as "2 or 4", or the only one; empty where none does."""
    nearest = sorted(working, key=lambda n: abs(n - wanted))[:2]
    return " or ".join(map(str, sorted(nearest)))


def nearest_divisors(number: int, wanted: int) -> str:
    return nearest_numbers((n for n in range(1, number + 1) if number % n == 0), wanted)


def nearest_multiples(unit: int, wanted: int) -> str:
    """Below and above a number that is none; 0 does not count."""
    below = wanted // unit * unit
    return nearest_numbers([n for n in (below, below + unit) if n], wanted)
