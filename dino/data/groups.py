"""Groups of samples, such as centres, patients and slides, and the share of the draws that each gets."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dino import randomness
from dino.data.datasets import SlideRanges

UNKNOWN_GROUP = "unknown"  # of slides or tiles that have no value of a column
SLOTS = 2**16  # draws after which the shares are exact, at least
SLOTS_PER_GROUP = 16  # and on average per group: they resolve differences of a few percent between groups

Unit = tuple[str | None, int]  # a slide, or its samples with one value of columns of tiles, by the number of the value


@dataclass(frozen=True)
class Balance:
    """How draws are distributed over groups.

    Attributes:
        columns: Columns whose values are the groups, each within those of the columns before it.
        temperature: A group's share among those of the same parent is in proportion to ``samples ** temperature``.
        weighted: Column of the weights; None for none.
        weights: By value of that column, at least 0; 1 for values that are left out.
        per_slide: Largest number of samples of a slide, 0 for all. Which are kept depends on the seed and the slide.
            For slides as a whole only, not with columns of tiles.
        seed: Seed of that subset.
    """

    columns: Sequence[str] = ()
    temperature: float = 0.0
    weighted: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    per_slide: int = 0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Groups:
    """Samples in groups, in memory that grows with the number of slides, not of samples.

    There are G groups of S slides, whose samples have R ranges of indices. Slides are sorted by group, ranges by slide.
    With columns of tiles, the samples of a slide that have one value count as a slide here, and memory grows with the
    number of ranges, which are then runs of consecutive samples with one value.

    Attributes:
        columns: Column of each value in the names.
        names: Values of each group, sorted.
        slots: ``(G,)`` draws of each group in a cycle of ``sum(slots)`` draws.
        first_slide: ``(G + 1,)`` first slide of each group.
        slide_ids: The slides, None for samples whose slide is not known; several times with columns of tiles.
        kept: ``(S + 1,)`` number of samples that may be drawn before each slide.
        sizes: ``(S,)`` number of samples of each slide, also of those that may not be drawn.
        before: ``(S,)`` number of samples before each slide.
        range_first: ``(R,)`` index of the first sample of each range.
        range_before: ``(R + 1,)`` number of samples before each range.
        seed: Seed of the subsets of slides.
    """

    columns: Sequence[str]
    names: Sequence[tuple[str, ...]]
    slots: np.ndarray
    first_slide: np.ndarray
    slide_ids: Sequence[str | None]
    kept: np.ndarray
    sizes: np.ndarray
    before: np.ndarray
    range_first: np.ndarray
    range_before: np.ndarray
    seed: int

    @classmethod
    def of(
        cls, ranges: SlideRanges, value: Callable[[str | None, str], str], balance: Balance, slots: int = SLOTS
    ) -> "Groups":
        """Group the samples of a dataset.

        Args:
            ranges: The slides of its samples; at least one sample.
            value: Returns a slide's value of a column that is none of the ranges' own.
            balance: How draws are distributed.
            slots: Smallest number of draws after which the shares are exact.

        Raises:
            ValueError: If no sample has a positive weight.
        """
        of_unit = _value_of_unit(ranges, value)
        numbers: dict[Unit, int] = {}
        slide_of_range = np.array([numbers.setdefault(one, len(numbers)) for one in ranges.units], np.int64)
        lengths = np.diff(ranges.starts)
        slides = list(numbers)
        sizes = np.bincount(slide_of_range, lengths, len(slides)).astype(np.int64)  # exact below 2^53
        weights = np.ones(len(slides))
        if balance.weighted is not None:
            weights = np.array([balance.weights.get(of_unit(one, balance.weighted), 1.0) for one in slides])
        kept = np.where(weights > 0, np.minimum(sizes, balance.per_slide or sizes), 0)
        if not kept.any():
            raise ValueError("no sample has a positive weight")
        columns, temperatures, level = _levels(slides, of_unit, balance)
        used = np.flatnonzero(kept)
        keys = {int(number): tuple(of_unit(slides[number], name) for name in columns) for number in used}
        names = sorted({*keys.values()})
        group_of = dict(zip(names, range(len(names)), strict=True))
        group = np.array([group_of[keys[int(number)]] for number in used], np.int64)
        order = used[np.argsort(group, kind="stable")]  # (S,) slides by group
        rank = np.full(len(slides), len(slides))
        rank[order] = np.arange(len(order))
        by_slide = np.argsort(rank[slide_of_range], kind="stable")[: int(np.isin(slide_of_range, order).sum())]
        counts = np.bincount(group, kept[used], len(names))
        group_weights = np.ones(len(names))
        group_weights[group] = weights[used]
        shares = _shares(names, counts, temperatures, (level, group_weights))
        return cls(
            columns,
            names,
            _slots(shares, max(slots, SLOTS_PER_GROUP * len(names))),
            _before(np.bincount(group, minlength=len(names))),
            [slides[number][0] for number in order],
            _before(kept[order]),
            sizes[order],
            _before(sizes[order])[:-1],
            ranges.starts[:-1][by_slide],
            _before(lengths[by_slide]),
            balance.seed,
        )

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.names)

    @property
    def samples(self) -> int:
        """Number of samples that may be drawn."""
        return int(self.kept[-1])

    @property
    def cycle(self) -> int:
        """Number of draws after which each group has had its share exactly."""
        return int(self.slots.sum())

    @property
    def shares(self) -> np.ndarray:
        """``(G,)`` share of the draws of each group."""
        return self.slots / self.cycle

    @cached_property
    def counts(self) -> np.ndarray:
        """``(G,)`` number of samples of each group that may be drawn."""
        return np.diff(self.kept[self.first_slide])

    def label(self, group: int) -> str:
        """A group's values as one text."""
        return " / ".join(self.names[group]) or "all"

    def index(self, group: int, item: int) -> int:
        """Index of a sample in the dataset.

        Args:
            group: Its group.
            item: Its number in ``[0, counts[group])``.
        """
        place = int(self.kept[self.first_slide[group]]) + item
        slide = int(np.searchsorted(self.kept, place, side="right")) - 1
        item, size = place - int(self.kept[slide]), int(self.sizes[slide])
        if self.kept[slide + 1] - self.kept[slide] < size:
            item = randomness.permuted(randomness.mixed(self.seed, f"subset/{self.slide_ids[slide]}"), item, size)
        place = int(self.before[slide]) + item
        found = int(np.searchsorted(self.range_before, place, side="right")) - 1
        return int(self.range_first[found]) + place - int(self.range_before[found])

    def at(self, indices: Sequence[int]) -> np.ndarray:
        """``(n,)`` group of each of n samples that may be drawn, by their indices in the dataset."""
        firsts, groups = self._group_of_range
        return groups[np.searchsorted(firsts, np.asarray(indices, np.int64), side="right") - 1]

    @cached_property
    def _group_of_range(self) -> tuple[np.ndarray, np.ndarray]:
        """``(R,)`` first sample of each range, sorted, and ``(R,)`` their groups."""
        order = np.argsort(self.range_first)
        slides = np.searchsorted(self.before, self.range_before[:-1][order], side="right") - 1
        return self.range_first[order], np.searchsorted(self.first_slide, slides, side="right") - 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which sample a draw takes."""
        texts = [list(self.columns), [list(name) for name in self.names], list(self.slide_ids), self.seed]
        digest = hashlib.sha256(json.dumps(texts).encode())
        for array in (self.slots, self.first_slide, self.kept, self.range_first, self.range_before):
            digest.update(array.astype(np.int64).tobytes())
        return digest.hexdigest()


def _value_of_unit(ranges: SlideRanges, value: Callable[[str | None, str], str]) -> Callable[[Unit, str], str]:
    places = {column: place for place, column in enumerate(ranges.columns)}

    def of_unit(unit: Unit, column: str) -> str:
        return ranges.values[unit[1]][places[column]] if column in places else value(unit[0], column)

    return of_unit


def _before(counts: np.ndarray) -> np.ndarray:
    """``(n + 1,)`` int64 sums of the counts before each place."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _levels(
    slides: Sequence[Unit], value: Callable[[Unit, str], str], balance: Balance
) -> tuple[list[str], list[float], int]:
    """Columns and temperatures of the levels of the tree of groups, and the level whose groups are weighted.

    That is the first whose groups have one weight each. Where there is none, the column of the weights becomes the last
    level, whose groups get shares in proportion to their samples, as without it, times their weights.
    """
    columns, temperatures = list(balance.columns), [balance.temperature] * len(balance.columns)
    if balance.weighted is None:
        return columns, temperatures, -1
    for level in range(len(columns)):
        weighted: dict[tuple[str, ...], str] = {}
        for slide in slides:
            found = value(slide, balance.weighted)
            if weighted.setdefault(tuple(value(slide, name) for name in columns[: level + 1]), found) != found:
                break
        else:
            return columns, temperatures, level
    return [*columns, balance.weighted], [*temperatures, 1.0], len(columns)


def _shares(
    names: Sequence[tuple[str, ...]],
    counts: np.ndarray,
    temperatures: Sequence[float],
    weighted: tuple[int, np.ndarray],
) -> np.ndarray:
    """Share of each group, the product of its shares among siblings on the way down the tree.

    Args:
        names: Values of each group.
        counts: ``(G,)`` samples of each.
        temperatures: Of each level.
        weighted: Level that weights apply to, -1 for none, and ``(G,)`` the weight of each group.
    """
    shares, parent = np.ones(len(names)), np.zeros(len(names), np.int64)
    for level, temperature in enumerate(temperatures):
        numbers: dict[tuple[str, ...], int] = {}
        node = np.array([numbers.setdefault(name[: level + 1], len(numbers)) for name in names], np.int64)
        first = np.unique(node, return_index=True)[1]  # of the groups of each node
        mass = np.bincount(node, counts) ** temperature
        if level == weighted[0]:
            mass = mass * weighted[1][first]
        shares *= mass[node] / np.bincount(parent[first], mass)[parent]
        parent = node
    return shares


def _slots(shares: np.ndarray, length: int) -> np.ndarray:
    """Numbers of draws in proportion to shares, by largest remainder, each at least 1, together at least ``length``."""
    quotas = shares * length
    slots = np.maximum(1, np.floor(quotas)).astype(np.int64)
    missing = length - int(slots.sum())
    if missing > 0:
        slots[np.argsort(slots - quotas, kind="stable")[:missing]] += 1
    return slots
