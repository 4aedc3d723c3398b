"""The cells of one slide: which to read, which are known, where their features go. Each is embedded once."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino.data.grids import open_grids
from dino.errors import DataError
from dino.extraction.embed import batches, read_ahead
from dino.extraction.pixels import RegionImage
from dino.extraction.tile_files import TileFile
from dino.files import atomic_path
from dino.slides.lattice import cells_of_region
from dino.slides.tables import RegionRecord

Embedder = Callable[[Iterable[Tensor]], Generator[Tensor, None, None]]


@dataclass(frozen=True)
class Known:
    """Tiles whose features are those of cells of a region that was written before.

    Attributes:
        region: Index of the region among those written before.
        cells: ``(n,)`` rows of the region's file.
        tiles: ``(n,)`` rows of the tile file.
    """

    region: int
    cells: np.ndarray
    tiles: np.ndarray


@dataclass(frozen=True)
class ReadPlan:
    """The units to read from one slide, and what the features of their cells are for.

    Attributes:
        units: Units in reading order: cells ``(x, y)``, or images of regions. Cells of regions come first.
        rows: For each region, ``(h * w,)`` indices of its cells among all cells read, row-major.
        cells: Number of cells in all units.
        kept: How many of them, the first, are cells of regions.
        tiles: ``(cells,)`` row of each cell in the tile file, -1 for none; None without tile file.
        known: The rows of the tile file that need not be embedded.
    """

    units: Sequence[Any]
    rows: Sequence[Tensor]
    cells: int
    kept: int
    tiles: np.ndarray | None = None
    known: Sequence[Known] = field(default_factory=list)


def plan_cells(
    records: Sequence[RegionRecord], coords: np.ndarray | None = None, done: Sequence[RegionRecord] = ()
) -> ReadPlan:
    """Plan to read cells: a cell that is part of several regions, or a tile too, is read and embedded once.

    Args:
        records: The regions to write.
        coords: ``(N, 2)`` the tiles of the tile file to write; None for no tile file.
        done: Regions that were written before, in which features of tiles are looked up.

    Raises:
        DataError: If a tile is listed twice.
    """
    index: dict[tuple[int, int], int] = {}
    rows = [torch.tensor([index.setdefault(cell, len(index)) for cell in _cells(record)]) for record in records]
    kept = len(index)
    if coords is None:
        return ReadPlan(list(index), rows, kept, kept)
    unknown = {(int(x), int(y)): row for row, (x, y) in enumerate(coords)}
    if len(unknown) != len(coords):
        raise DataError(f"expected every tile once in tiles.csv, found {len(coords) - len(unknown)} twice; tile again")
    known = []
    for number, record in enumerate(done):
        found = [(i, unknown.pop(cell)) for i, cell in enumerate(_cells(record)) if cell in unknown]
        if found:
            known.append(Known(number, *np.array(found).T))
    for cell in unknown:
        index.setdefault(cell, len(index))
    tiles = np.array([unknown.get(cell, -1) for cell in index], np.int64)
    return ReadPlan(list(index), rows, len(index), kept, tiles, known)


def plan_images(images: Sequence[RegionImage]) -> ReadPlan:
    """Plan to read images of regions."""
    rows, start = [], 0
    for image in images:
        count = image.record.grid[0] * image.record.grid[1]
        rows.append(torch.arange(start, start + count))
        start += count
    return ReadPlan(list(images), rows, start, start)


def count_cells(
    records: Sequence[RegionRecord], coords: np.ndarray | None = None, done: Sequence[RegionRecord] = ()
) -> int:
    """``plan_cells(…).cells``, much faster."""
    found = _codes(records)
    if coords is not None:
        found = np.concatenate([found, np.setdiff1d(_code(coords), _codes(done))])
    return len(np.unique(found))


def _cells(record: RegionRecord) -> list[tuple[int, int]]:
    cells = cells_of_region(record.x, record.y, record.step_lv0, record.grid)
    return [(int(x), int(y)) for x, y in cells]


def _codes(records: Sequence[RegionRecord]) -> np.ndarray:
    parts = [_code(cells_of_region(r.x, r.y, r.step_lv0, r.grid)) for r in records]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _code(coords: np.ndarray) -> np.ndarray:
    """One number for each position, whose coordinates are below 2^31."""
    return coords[:, 0] * 2**32 + coords[:, 1]


@dataclass(frozen=True)
class Reading:
    """How pixels are read.

    Attributes:
        batch_size: Cells in a batch.
        workers: Threads that read ahead.
        ahead: Maximum number of units read in advance.
    """

    batch_size: int
    workers: int
    ahead: int


def write_regions(
    plan: ReadPlan,
    paths: Sequence[Path],
    read: Callable[[Any], Tensor],
    embedder: Embedder,
    reading: Reading,
    advance: Callable[[int], None] = lambda cells: None,
    tile_file: TileFile | None = None,
) -> None:
    """Embed the cells of one slide; write each region and each row of the tile file as soon as it is embedded.

    Args:
        plan: Result of :func:`plan_cells` or :func:`plan_images`.
        paths: The ``.pt`` of each region.
        read: Reads one unit as ``(n, 3, S, S)`` uint8.
        embedder: Maps batches ``(B, 3, S, S)`` to features ``(B, D)``, one by one.
        reading: Batch size and threads.
        advance: Called with the number of cells embedded since the last call.
        tile_file: Receives the rows of ``plan.tiles``.

    Raises:
        DataError: If pixels cannot be read. The regions written so far are kept.
    """
    features, done, written = torch.empty(0), 0, 0
    # Closed explicitly, not by the garbage collector: no thread may read from a slide after it was closed.
    with closing(read_ahead(read, plan.units, reading.workers, reading.ahead)) as blocks:
        cells = (cell for block in blocks for cell in block)
        # Batches of regions end with them, so that their features do not depend on whether tiles follow.
        whole = chain(batches(islice(cells, plan.kept), reading.batch_size), batches(cells, reading.batch_size))
        with closing(embedder(whole)) as parts:
            for part in parts:
                if tile_file is not None and plan.tiles is not None:
                    rows = plan.tiles[done : done + len(part)]
                    tile_file.write(rows[rows >= 0], part[torch.from_numpy(rows >= 0)])
                if done < plan.kept:
                    if not done:
                        features = torch.empty(plan.kept, part.shape[1])  # (cells of regions, D)
                    features[done : done + len(part)] = part[: plan.kept - done]
                done += len(part)
                while written < len(paths) and int(plan.rows[written].max()) < done:
                    write_features(paths[written], features[plan.rows[written]])
                    written += 1
                advance(len(part))


def copy_known(plan: ReadPlan, paths: Sequence[Path], tile_file: TileFile) -> None:
    """Write the rows of a tile file that are cells of regions which were written before.

    Args:
        plan: Result of :func:`plan_cells`.
        paths: The ``.pt`` of each region that was written before.
        tile_file: The tile file.

    Raises:
        DataError: If a file was replaced meanwhile.
    """
    for known in plan.known:
        features = open_grids(paths[known.region])[0]  # (h * w, D)
        tile_file.write(known.tiles, features[torch.from_numpy(known.cells)])


def write_features(path: Path, features: Tensor) -> None:
    """Write one region atomically.

    Args:
        path: The ``.pt``; its folder must exist.
        features: ``(h * w, D)``, row-major. Copied first, because ``torch.save`` writes the complete storage of a view.
    """
    copy = features.to(torch.float32).clone(memory_format=torch.contiguous_format)
    # torch.save to a path reports a full disk as a RuntimeError; to a Python file, as an OSError.
    with atomic_path(path, make_folder=False) as temporary, temporary.open("wb") as file:
        torch.save(copy, file)


def is_written(path: Path, cells: int, dim: int) -> bool:
    """Whether ``path`` contains the features of a region of ``cells`` cells, float32 ``(cells, dim)``."""
    if not path.is_file():
        return False
    try:
        features = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # damaged: it is written again
        return False
    return isinstance(features, Tensor) and features.dtype == torch.float32 and features.shape == (cells, dim)
