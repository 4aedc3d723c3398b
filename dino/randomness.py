"""Random numbers as a function of the draw number.

A draw number ``d = step * global_batch + row`` identifies one training sample. Its index in the data, its crops and the
residual branches that drop-path skips depend on ``(seed, d)`` only, not on the worker, the rank or the time. Resuming
therefore needs an offset, not a saved state, and the samples do not depend on the number of processes.
"""

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 4
MASK = (1 << 64) - 1


class Stream:
    """A generator that is reset for each draw, which takes a tenth of the time of constructing a new one.

    Args:
        seed: The run's seed.
        purpose: Name of the use of the numbers; different purposes have independent numbers.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._philox = np.random.Philox(key=np.array([_mix(seed, purpose), 0], dtype=np.uint64))
        self._start = self._philox.state  # before the first number
        self._generator = np.random.Generator(self._philox)

    def at(self, draw: int) -> np.random.Generator:
        """The generator, reset to the first number of a draw; the same object each time, so use one draw at a time."""
        self._start["state"]["key"][1] = draw & MASK
        self._philox.state = self._start
        return self._generator


def generator(seed: int, draw: int, purpose: str) -> np.random.Generator:
    """Counter-based generator (Philox) for one draw and one purpose.

    Args:
        seed: The run's seed.
        draw: Draw number.
        purpose: Name of the use of the numbers; different purposes have independent numbers.

    Returns:
        A new numpy generator; the same arguments always give the same numbers.
    """
    return Stream(seed, purpose).at(draw)


def permuted(seed: int, draw: int, count: int) -> int:
    """Index of the item of a draw: every pass over ``count`` items is a new permutation.

    A Feistel network over the next even power of two, with cycle walking to indices below ``count``. It needs O(1)
    memory, and the draws ``p * count ... (p + 1) * count - 1`` have different items.

    Args:
        seed: The run's seed.
        draw: Draw number.
        count: Number of items.

    Returns:
        An index in ``[0, count)``.
    """
    epoch, position = divmod(draw, count)
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    keys = [_mix(seed, f"permutation/{epoch}/{r}") for r in range(ROUNDS)]
    value = position
    while True:
        left, right = value >> half_bits, value & half_mask
        for key in keys:
            left, right = right, left ^ (_scramble(right ^ key) & half_mask)
        value = (left << half_bits) | right
        if value < count:
            return value


def mixed(seed: int, purpose: str) -> int:
    """A seed of 64 bits for one purpose."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


_mix = lru_cache(maxsize=1024)(mixed)  # the same few purposes for every draw


def _scramble(value: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit affects every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
