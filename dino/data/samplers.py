"""Samplers: which item of a dataset a draw takes, as a function of the draw number alone."""

from typing import Protocol

from dino import randomness


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
