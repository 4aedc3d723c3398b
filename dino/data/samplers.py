"""Samplers: which item of a dataset a draw takes, as a function of the draw number alone."""

from functools import lru_cache
from typing import Protocol

import numpy as np

from dino import randomness
from dino.data.groups import Groups


class Sampler(Protocol):
    """Maps draw numbers to indices of a dataset.

    The result depends on nothing but the arguments and what the sampler was made with: not on a worker, a process, the
    time, or earlier draws. So resuming is an offset, and any number of processes and workers sees the same samples.
    """

    def __call__(self, draw: int, attempt: int = 0) -> int:
        """Index of the item that a draw takes.

        Args:
            draw: Draw number, ``step * global_batch + row``.
            attempt: 0, or the number of the replacement where the item of the previous attempt cannot be used.
        """
        ...


class PermutationSampler:
    """Every item once per pass, each pass in a new order; replacements are drawn uniformly.

    Args:
        count: Number of items.
        seed: Seed of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __call__(self, draw: int, attempt: int = 0) -> int:
        """Index in ``[0, count)``."""
        if attempt == 0:
            return randomness.permuted(self.seed, draw, self.count)
        return int(randomness.generator(self.seed, draw, f"replacement/{attempt}").integers(self.count))


class GroupSampler:
    """Every group its share of the draws, and every sample of a group once before one is drawn again.

    Each cycle has the numbers of draws of all groups (``groups.slots``) in a new order, so the shares are exact after
    each. The ``k``-th draw of a group, over all cycles, takes the ``k``-th item of its own permutations. Replacements
    are drawn uniformly from the same group. The order of one cycle is kept in memory.

    Args:
        groups: The groups.
        seed: Seed of the order.
    """

    def __init__(self, groups: Groups, seed: int) -> None:
        self.groups, self.seed = groups, seed
        self._cycle: tuple[int, np.ndarray, np.ndarray] | None = None

    def __call__(self, draw: int, attempt: int = 0) -> int:
        """Index of a sample in the dataset."""
        groups = self.groups
        cycle, slot = divmod(draw, groups.cycle)
        order, rank = self._order(cycle)
        group = int(order[slot])
        count = int(groups.counts[group])
        if attempt == 0:
            number = cycle * int(groups.slots[group]) + int(rank[slot])
            item = randomness.permuted(_seed_of(self.seed, groups.names[group]), number, count)
        else:
            item = int(randomness.generator(self.seed, draw, f"replacement/{attempt}").integers(count))
        return groups.index(group, item)

    def _order(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """``(cycle,)`` group of each draw of a cycle, and how many draws of that group there were before it."""
        if self._cycle is None or self._cycle[0] != cycle:
            slots = self.groups.slots
            order = np.repeat(np.arange(len(slots), dtype=np.int32), slots)
            randomness.generator(self.seed, cycle, "groups").shuffle(order)
            rank = np.empty(len(order), np.int32)
            first = np.repeat(np.cumsum(slots) - slots, slots)
            rank[np.argsort(order, kind="stable")] = np.arange(len(order)) - first
            self._cycle = (cycle, order, rank)
        return self._cycle[1], self._cycle[2]

    def __getstate__(self) -> dict[str, object]:
        """Without the order, which is quickly made again."""
        return {**vars(self), "_cycle": None}


@lru_cache(maxsize=2**16)
def _seed_of(seed: int, name: tuple[str, ...]) -> int:
    return randomness.mixed(seed, "group/" + "\0".join(name))
