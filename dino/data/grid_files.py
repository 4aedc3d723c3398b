"""The files of feature grids that a run trains on: what they hold, and whether they are what they were."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino.data.grids import grid_shape, open_grids
from dino.errors import DataError
from dino.files import printable


@dataclass(frozen=True)
class GridEntry:
    """One file of feature grids and what ``regions.csv`` says of it."""

    path: Path
    slide_id: str | None = None
    shape: tuple[int, int] | None = None
    tissue: np.ndarray | None = None


@dataclass(frozen=True)
class Survey:
    """What the files of a folder hold, without their values.

    Attributes:
        regions: How many regions each file holds; 1 for a file that is no grid.
        bad: Numbers of the files that are no grids.
        height: Rows of cells, of every grid.
        width: Columns of cells, of every grid.
        dim: D, of every grid.
    """

    regions: list[int]
    bad: list[int]
    height: int
    width: int
    dim: int


def survey(
    root: Path, entries: Sequence[GridEntry], notice: Callable[[], None] = lambda: None, max_bad_fraction: float = 0.0
) -> Survey:
    """Open every file, without reading its values.

    Args:
        root: The folder, for messages.
        entries: Its files.
        notice: Called after each checked file, for a progress bar.
        max_bad_fraction: Share of the files that may be no grids.

    Raises:
        DataError: If more files than that are no grids, or D or the shape differ within the folder.
    """
    kinds: dict[tuple[int, int, int], Path] = {}
    regions, bad = [], []
    for number, entry in enumerate(entries):
        try:
            count, dim, shape = _kind(entry)
            kinds.setdefault((dim, *shape), entry.path)
        except DataError:
            count = 1
            bad.append(number)
        regions.append(count)
        notice()
    refuse_bad(entries, bad, max_bad_fraction)
    if len(kinds) != 1:
        found = "; ".join(f"D={d}, {h} x {w} in {printable(path.name)}" for (d, h, w), path in list(kinds.items())[:3])
        raise DataError(f"expected grids of one D and one shape in {root}, found {found or 'none'}; split the folder")
    ((dim, height, width),) = kinds
    return Survey(regions, bad, height, width, dim)


def _kind(entry: GridEntry) -> tuple[int, int, tuple[int, int]]:
    """Regions, D, and (h, w) of a file."""
    regions, cells, dim = open_grids(entry.path).shape
    return regions, dim, grid_shape(entry.path, cells, entry.shape)


def refuse_bad(entries: Sequence[GridEntry], bad: Sequence[int], max_bad_fraction: float) -> None:
    """Refuse a folder with too many files that are no grids.

    Raises:
        DataError: If more than ``max_bad_fraction`` of the files are; it says what is wrong with the first.
    """
    if len(bad) <= max_bad_fraction * len(entries):
        return
    more = f" (and {len(bad) - 1} more such files)" if len(bad) > 1 else ""
    raise DataError(
        f"{_why(entries[bad[0]])}{more}; more than training.max_bad_fraction={max_bad_fraction:g} of the files"
    )


def _why(entry: GridEntry) -> str:
    try:
        _kind(entry)
    except DataError as error:
        return str(error)
    return f"expected a grid in {printable(entry.path)}, found another file a moment ago"
