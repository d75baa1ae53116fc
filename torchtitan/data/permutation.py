"""Which document comes at a given place of an epoch's shuffled order?"""

_MASK = (1 << 64) - 1
_ROUNDS = 6  # four suffice for large sizes; two more even out orders of a handful of documents


def mix(*values: int) -> int:
    """64 well-mixed bits of some integers: the seed of everything that is drawn in the data.

    Each value goes through the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """Where a permutation of range(size), chosen by `key`, sends `index`.

    Computed place by place, so that a billion documents cost no table: a Feistel network permutes
    the next power of four, and indices that land outside go through it again until they are inside
    (cycle walking; Black and Rogaway, 2002).
    """
    assert 0 <= index < size, f"index {index} of {size}"
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (mix(key + (round_number << half) + right) & mask)
        index = left << half | right
        if index < size:
            return index
