"""Positions of many tiles in little memory: those of a slide lie on a lattice, so one bit for each cell is enough."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dino.errors import DataError
from dino.slides.tables import TILE_NUMBERS, tile_chunks, tile_table

TABLE_SIZE = 2**22  # coordinates below it are numbered through a table, which is faster than sorting them
BITS_PER_TILE = 1000  # more cells than this per tile, and than FEW_BITS, are those of no lattice
FEW_BITS = 2**20
READ = ("x", "y", "step_lv0", "spacing_um")


@dataclass(frozen=True, eq=False)
class Places:
    """Positions of N tiles of one slide in H rows and W columns, in row-major order (y, then x).

    Attributes:
        xs: (W,) int64 level-0 x of the columns.
        ys: (H,) int64 level-0 y of the rows.
        bits: (H, W / 8) uint8, a bit for each cell that has a tile.
        ends: (H + 1,) int32 number of tiles before each row.
    """

    xs: np.ndarray
    ys: np.ndarray
    bits: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, coords: np.ndarray) -> "Places":
        """The places at ``coords`` (N, 2) int64 level-0 ``(x, y)``, in any order; equal ones count once.

        Raises:
            ValueError: If they are on no lattice.
        """
        (xs, column), (ys, row) = _numbered(coords[:, 0]), _numbered(coords[:, 1])
        if len(xs) * len(ys) > max(FEW_BITS, BITS_PER_TILE * len(coords)):
            raise ValueError(f"{len(coords)} tiles in {len(ys)} rows and {len(xs)} columns are on no lattice")
        cells = np.zeros((len(ys), len(xs)), bool)
        cells[row, column] = True
        ends = np.concatenate([[0], np.cumsum(cells.sum(1))]).astype(np.int32)
        return cls(xs, ys, np.packbits(cells, axis=1), ends)

    def __len__(self) -> int:
        """Number of tiles."""
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Level-0 ``(x, y)`` of a tile."""
        row = int(np.searchsorted(self.ends, number, side="right")) - 1
        columns = np.unpackbits(self.bits[row]).nonzero()[0]
        return int(self.xs[columns[number - int(self.ends[row])]]), int(self.ys[row])

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether there is a tile at a level-0 ``(x, y)``."""
        column, row = (int(np.searchsorted(axis, at)) for axis, at in zip((self.xs, self.ys), place, strict=True))
        if column == len(self.xs) or row == len(self.ys) or (self.xs[column], self.ys[row]) != place:
            return False
        return bool(self.bits[row, column // 8] >> (7 - column % 8) & 1)

    @property
    def coords(self) -> np.ndarray:
        """(N, 2) int64 level-0 ``(x, y)``."""
        row, column = np.unpackbits(self.bits, axis=1).nonzero()
        return np.stack([self.xs[column], self.ys[row]], axis=1)


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values in order, and the number of each value among them."""
    if not len(values) or values.min() < 0 or values.max() >= TABLE_SIZE:
        return np.unique(values, return_inverse=True)
    found = np.zeros(int(values.max()) + 1, bool)
    found[values] = True
    return found.nonzero()[0], (np.cumsum(found, dtype=np.int32) - 1)[values]


@dataclass(frozen=True, eq=False)
class PlacedTiles:
    """The places of the tiles of one slide, their footprint at level 0, and the actual spacing of their pixels."""

    slide_id: str
    places: Places
    step_lv0: int
    spacing_um: float

    @property
    def coords(self) -> np.ndarray:
        """(N, 2) int64 level-0 ``(x, y)``, row-major."""
        return self.places.coords

    def some(self, kept: np.ndarray) -> "PlacedTiles":
        """Those of ``kept``, (N,) bool."""
        return replace(self, places=Places.of(self.coords[kept]))


NOWHERE = Places.of(np.zeros((0, 2), np.int64))


def read_places(root: Path) -> dict[str, PlacedTiles]:
    """The places of the tiles of each slide that has any, in less than a byte of memory for most tiles.

    Raises:
        DataError: If the table of tiles is absent or damaged.
    """
    found: dict[str, PlacedTiles] = {}
    for slide, coords, step, spacing in _slides(root):
        known = found.get(slide, PlacedTiles(slide, NOWHERE, step, spacing))  # known if its rows are not all together
        try:
            places = Places.of(np.concatenate([known.coords, coords]) if known.places else coords)
        except ValueError as error:
            raise DataError(
                f"expected {tile_table(root)} as written by `dino tile`, found other places of slide '{slide}': {error}"
            ) from None
        found[slide] = replace(known, places=places)
    return found


def _slides(root: Path) -> Iterator[tuple[str, np.ndarray, int, float]]:
    """Slide, (N, 2) coordinates, footprint and spacing of consecutive tiles of one slide."""
    held: list[np.ndarray] = []
    slide, first = None, (0, 0.0)
    for following, columns in tile_chunks(root, numbers={name: TILE_NUMBERS[name] for name in READ}):
        if following != slide and slide is not None:
            yield slide, np.concatenate(held), *first
            held = []
        if following != slide:
            slide, first = following, (int(columns["step_lv0"][0]), float(columns["spacing_um"][0]))
        held.append(np.stack([columns["x"], columns["y"]], axis=1))
    if slide is not None:
        yield slide, np.concatenate(held), *first
