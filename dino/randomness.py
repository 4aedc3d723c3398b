"""Everything random as a function of the draw number.

A draw number ``d = step * global_batch + row`` names one training sample. Which item it is, how it is cropped and
which residual branches it skips follow from ``(seed, d)`` alone: never from a worker, a rank, or the time. Resuming is
therefore an offset, not a saved state, and any number of processes sees the same samples.
"""

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 4
MASK = (1 << 64) - 1


class Stream:
    """One generator that goes from draw to draw: making a new one takes ten times as long as moving it.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for; two purposes never share numbers.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._philox = np.random.Philox(key=np.array([_mix(seed, purpose), 0], dtype=np.uint64))
        self._start = self._philox.state  # at the first number
        self._generator = np.random.Generator(self._philox)

    def at(self, draw: int) -> np.random.Generator:
        """The generator at the first number of a draw; the same object each time, so that one draw ends the last."""
        self._start["state"]["key"][1] = draw & MASK
        self._philox.state = self._start
        return self._generator


def generator(seed: int, draw: int, purpose: str) -> np.random.Generator:
    """Counter-based generator (Philox) for one draw and one purpose.

    Args:
        seed: The run's seed.
        draw: Draw number.
        purpose: What the numbers are for; two purposes never share numbers.

    Returns:
        A fresh numpy generator; the same arguments always give the same numbers.
    """
    return Stream(seed, purpose).at(draw)


def permuted(seed: int, draw: int, count: int) -> int:
    """Index of the item that draw ``draw`` takes: every pass over ``count`` items is a new permutation.

    A Feistel network over the next even power of two, walked until it lands below ``count``: O(1) memory for any
    number of items, and each of the draws ``p * count ... (p + 1) * count - 1`` takes a different item.

    Args:
        seed: The run's seed.
        draw: Draw number.
        count: How many items there are.

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


@lru_cache(maxsize=1024)  # the same few purposes for every draw
def _mix(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


def _scramble(value: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
