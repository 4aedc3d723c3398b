"""Values of the tiles themselves, such as their annotation, from the tables of tiles of data folders."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np

from dino.data.datasets import Dataset, SlideRanges
from dino.data.groups import UNKNOWN_GROUP
from dino.slides.tables import (
    ANNOTATION_COLUMNS,
    TILE_COLUMNS,
    TILE_NUMBERS,
    tile_chunks,
    tile_header,
    tile_table,
)

POSITION = {name: TILE_NUMBERS[name] for name in ("x", "y", "step_lv0")}

Runs = tuple[np.ndarray, np.ndarray]  # first index of each, and the number of its values


@dataclass(frozen=True)
class TileValues:
    """The tables of the tiles of one or several data folders.

    Attributes:
        parts: Each data folder, and its tiles in the order of their indices.
    """

    parts: Sequence[tuple[Path, Dataset]]

    @cached_property
    def columns(self) -> list[str]:
        """Columns that tables have beside slide, position and numbers that ``dino tile`` writes.

        Raises:
            DataError: If a table is damaged.
        """
        return list(dict.fromkeys(name for root, _ in self.parts for name in _columns(root)))

    def ranges(self, columns: Sequence[str] = ()) -> SlideRanges:
        """The slides of the tiles, and their values of some columns: ``unknown`` where there is none, or it is blank.

        The table of a folder is read once, a piece at a time; what is kept grows with the number of runs of
        consecutive tiles that have one value.

        Raises:
            DataError: If a table is damaged.
        """
        parts = [_value_ranges(dataset, root, columns) if columns else dataset.ranges for root, dataset in self.parts]
        return SlideRanges.joined(parts)


def _columns(root: Path) -> list[str]:
    numbers = {*TILE_COLUMNS, ANNOTATION_COLUMNS[1]}
    return [name for name in tile_header(root) if name not in numbers] if tile_table(root).exists() else []


def _value_ranges(dataset: Dataset, root: Path, columns: Sequence[str]) -> SlideRanges:
    """The ranges of the samples of one data folder with one slide and one value of each column.

    Rows and samples are in different orders, so they are matched by slide and position.
    """
    whole = dataset.ranges
    spans = list(zip(whole.starts[:-1].tolist(), whole.starts[1:].tolist(), strict=True))
    of_slide: dict[str | None, list[int]] = defaultdict(list)
    for number, slide in enumerate(whole.slide_ids):
        of_slide[slide].append(number)
    values = {(UNKNOWN_GROUP,) * len(columns): 0}
    runs: list[Runs] = [(np.array([start]), np.zeros(1, np.int64)) for start, _ in spans]
    for slide, places, codes in _rows(root, columns, values):
        for number in of_slide.get(slide, ()):
            start, end = spans[number]
            x, y = dataset.places(start, end).T
            wanted = y << 32 | x
            row = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
            # A slide whose rows are not all together has values already.
            before = np.repeat(runs[number][1], np.diff([*runs[number][0], end]))
            runs[number] = _runs(np.where(places[row] == wanted, codes[row], before), start)
    counts = [len(first) for first, _ in runs]
    slide_ids = [slide for slide, count in zip(whole.slide_ids, counts, strict=True) for _ in range(count)]
    starts = np.concatenate([*(first for first, _ in runs), whole.starts[-1:]])
    return SlideRanges(slide_ids, starts, columns, list(values), np.concatenate([codes for _, codes in runs]))


def _rows(
    root: Path, columns: Sequence[str], values: dict[tuple[str, ...], int]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Slide, ``(n,)`` int64 ``y << 32 | x``, sorted, and ``(n,)`` numbers of the values of consecutive rows of a slide.

    Args:
        root: The data folder.
        columns: The columns; those that its table does not have are blank.
        values: Number of each combination of values, to which new ones are added.
    """
    present = [name for name in columns if name in _columns(root)]
    if not present:
        return
    for slide, pieces in groupby(tile_chunks(root, present, POSITION), key=lambda piece: piece[0]):
        places, codes = [], []
        for _, cells in pieces:
            count = len(cells["x"])
            texts = [cells[name] if name in present else np.full(count, "", object) for name in columns]
            codes.append(_numbered(texts, values))
            places.append(cells["y"] << 32 | cells["x"])
        where = np.concatenate(places)
        order = np.argsort(where, kind="stable")
        yield slide, where[order], np.concatenate(codes)[order]


def _numbered(texts: Sequence[np.ndarray], values: dict[tuple[str, ...], int]) -> np.ndarray:
    """Number of the values of each of n consecutive rows, of which only the first of a run is looked up.

    Args:
        texts: ``(n,)`` objects of each column.
        values: As in :func:`_rows`.
    """
    changes = np.any([column[1:] != column[:-1] for column in texts], axis=0)
    first = np.concatenate([[0], np.flatnonzero(changes) + 1])
    rows = zip(*(column[first].tolist() for column in texts), strict=True)
    named = (tuple(text or UNKNOWN_GROUP for text in row) for row in rows)
    numbers = [values.setdefault(row, len(values)) for row in named]
    return np.repeat(numbers, np.diff([*first, len(texts[0])]))


def _runs(codes: np.ndarray, start: int) -> Runs:
    """Runs of equal values of consecutive samples, the first of which has the index ``start``."""
    first = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1])
    return first + start, codes[first]
