"""Feature grids of regions that are cut from files of features of tiles, such as TRIDENT's ``<slide>.h5``.

The tiles of such a file lie on a lattice, and only tiles with tissue are in it. A region is n x n cells of the lattice;
grids have no cells without features, so that the regions are those of which every tile is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino.data.bags import Bag, open_bag
from dino.errors import DataError
from dino.files import printable, stamp

STEP = "patch_size_level0"  # attribute of a tile's side in level-0 px, as CLAM, TRIDENT and this package write it
OVERLAP = "overlap"


@dataclass(frozen=True)
class RegionGrids:
    """The grids of one slide, read when they are indexed.

    Attributes:
        bag: Features of its tiles.
        rows: ``(M, n * n)`` rows of the cells of each region in the bag, row-major.
    """

    bag: Bag
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(M, n * n, D)``."""
        return len(self.rows), self.rows.shape[1], self.bag.dim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, region: int) -> Tensor:
        """``(n * n, D)`` float32 cells of a region."""
        return torch.from_numpy(self.bag.read(self.rows[region]))


def open_regions(path: Path, side: int) -> RegionGrids:
    """Find the regions of a file of features, without reading the features.

    Args:
        path: ``.h5`` with ``features`` and ``coords``.
        side: Cells n along a side of a region.

    Raises:
        DataError: If the file is damaged, or its tiles do not lie on one lattice.
    """
    return _open(Path(path), side, stamp(path))


@lru_cache(maxsize=4)
def _open(path: Path, side: int, _: Any) -> RegionGrids:
    bag = open_bag(path)
    if bag.coords is None:
        raise DataError(f"expected coordinates of tiles in {printable(path)}, found none")
    return RegionGrids(bag, complete_regions(lattice(bag.coords, _step(path, bag)), side))


def lattice(coords: np.ndarray, step: int) -> np.ndarray:
    """Rows of tiles by the cell of the lattice that they are.

    Args:
        coords: ``(N, 2)`` level-0 ``(x, y)``.
        step: Distance of cells in level-0 px.

    Returns:
        ``(H, W)`` row of each cell's tile; -1 where there is none. Without tiles, H and W are 0.

    Raises:
        DataError: If tiles are not on one lattice, or two are on one cell.
    """
    if not len(coords):
        return np.empty((0, 0), np.int64)
    cells, rest = np.divmod(coords - coords.min(0), step)
    if rest.any():
        raise DataError(
            f"expected tiles on one lattice of {step} px, found {np.count_nonzero(rest.any(1))} of {len(coords)} "
            "beside that of the first one; features of tiles that were cut contour by contour form no regions"
        )
    width, height = cells.max(0) + 1
    found = np.full((height, width), -1, np.int64)
    found[cells[:, 1], cells[:, 0]] = np.arange(len(cells))
    if np.count_nonzero(found >= 0) < len(cells):
        raise DataError("expected every tile once, found two with the same coordinates")
    return found


def complete_regions(cells: np.ndarray, side: int) -> np.ndarray:
    """Regions of n x n cells that all have a tile.

    They do not overlap: their lattice of n cells has the offset that gives the most of them, the first of equals.

    Args:
        cells: ``(H, W)`` from :func:`lattice`.
        side: n.

    Returns:
        ``(M, n * n)`` rows of their tiles, row-major, the regions row-major as well.
    """
    none = np.empty((0, side * side), np.int64)
    if min(cells.shape) < side:
        return none
    sums = np.pad((cells >= 0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    complete = inside == side * side  # (H - n + 1, W - n + 1), by the first cell of a region
    counts = {(y, x): np.count_nonzero(complete[y::side, x::side]) for y in range(side) for x in range(side)}
    top, left = max(counts, key=lambda offset: (counts[offset], -offset[0], -offset[1]))
    found = np.argwhere(complete[top::side, left::side]) * side + (top, left)
    return np.stack([cells[y : y + side, x : x + side].ravel() for y, x in found]) if len(found) else none


def _step(path: Path, bag: Bag) -> int:
    attributes: Mapping[str, Any] = bag.attributes
    if attributes.get(OVERLAP):
        raise DataError(
            f"expected tiles without overlap in {printable(path)}, found {OVERLAP}={attributes[OVERLAP]}; regions are "
            "cut from tiles that lie side by side"
        )
    try:
        step = int(attributes[STEP])
    except (KeyError, TypeError, ValueError):
        step = 0
    if step < 1:
        raise DataError(f"expected the attribute {STEP} of the coordinates in {printable(path)}, found none")
    return step
