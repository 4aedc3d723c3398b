"""Several processes at one extraction: one decides what is to do, each does its share, all know what failed."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dino import distributed
from dino.errors import DinoError

T = TypeVar("T")


def agreed(decide: Callable[[], T]) -> T:
    """What the main process decides, on every process; its refusal is raised on every process too."""
    outcome: Any = None
    if distributed.is_main():
        try:
            outcome = decide()
        except DinoError as error:
            outcome = error
    outcome = distributed.broadcast(outcome)
    if isinstance(outcome, DinoError):
        raise outcome
    return outcome


def merged(failures: dict[str, str]) -> dict[str, str]:
    """Every process's failures, on every process."""
    return {slide: reason for share in distributed.gather(failures) for slide, reason in share.items()}


def shares(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Share out items over processes: the largest first, each to the process with the least so far.

    Args:
        sizes: Cells of each slide.
        parts: How many processes.

    Returns:
        Indices for each process, ascending; the same on every process.
    """
    loads, taken = [0] * parts, [[] for _ in range(parts)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        loads[least] += sizes[index]
        taken[least].append(index)
    return [sorted(indices) for indices in taken]
