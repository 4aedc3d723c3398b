"""Feature grids: ``.pt`` files of level-1 features to ``(D, h, w)`` tensors, and checks of whole folders of them.

A file of this package (and of the original system) contains one region, ``[npatch x D]``; HIPT stores the regions of a
slide as ``[M x 256 x D]`` and slide2vec as ``(R, T, D)``. Rows are row-major (y, then x) unless ``order="xy"``. From an
``.h5`` of features of tiles (TRIDENT, CLAM, ``features_<encoder>/``) grids are cut, see :mod:`.region_grids`.
"""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dino.errors import ConfigError, DataError
from dino.files import printable

ORDERS = ("yx", "xy")
SMALLEST_SIDE = 4


class Grids(Protocol):
    """The regions of a file: a memory-mapped tensor, or what reads each of them."""

    @property
    def shape(self) -> Sequence[int]:
        """``(M, T, D)``: M regions of T cells."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, region: int, /) -> Tensor: ...


def open_grids(path: Path, shape: tuple[int, int] | None = None) -> Grids:
    """Memory-map a ``.pt`` file and check its rank and type, without reading its values.

    Args:
        path: File that contains one tensor; or an ``.h5`` of features of tiles, from which regions are cut.
        shape: ``(n, n)`` cells of the regions that are cut.

    Returns:
        ``(M, T, D)``: M regions of T cells, not read yet.

    Raises:
        DataError: If the file is damaged, contains anything but one floating-point tensor, or has another rank.
    """
    if path.suffix == ".h5" and shape:
        from dino.data.region_grids import open_regions  # needs h5py

        return open_regions(path, shape[0])
    tensor = open_tensor(path, {2: "[cells x D]", 3: "[regions x cells x D]"})
    return tensor if tensor.ndim == 3 else tensor[None]


def open_tensor(path: Path, ranks: Mapping[int, str]) -> Tensor:
    """Memory-map the one floating-point tensor of a ``.pt`` file, without reading its values.

    Args:
        path: The file.
        ranks: The number of dimensions that it may have, and what to call such a tensor.

    Raises:
        DataError: As for :func:`open_grids`.
    """
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"expected one tensor in {printable(path)}, found objects whose loading would run code"
        ) from None
    except Exception as error:  # torch raises many types on damaged archives
        reason = f"{type(error).__name__}: {printable(error)[:200]}"
        raise DataError(f"cannot read {printable(path)}: {reason}") from None
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim not in ranks:
        found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DataError(f"expected a float tensor {' or '.join(ranks.values())} in {printable(path)}, found {found}")
    if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise DataError(
            f"expected {printable(path)} to contain all of its {tuple(tensor.shape)} values, found fewer; save it again"
        )
    if 0 in tensor.shape:
        raise DataError(f"expected features in {printable(path)}, found an empty tensor {tuple(tensor.shape)}")
    return tensor


def grid_shape(path: Path, cells: int, shape: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of a grid of ``cells`` rows.

    Args:
        path: The file, for the message.
        cells: Its number of rows.
        shape: ``(h, w)`` from ``regions.csv``, or None for a square grid.

    Raises:
        DataError: If the number of rows is not that of the grid, or a side is under 4 cells.
    """
    side = math.isqrt(cells)
    height, width = shape or (side, side)
    if height * width != cells:
        wanted = f"{height} x {width} = {height * width} rows" if shape else "a square number of rows"
        raise DataError(
            f"expected {wanted} in {printable(path)}, found {cells}; rectangular grids need a regions.csv beside them"
        )
    if min(height, width) < SMALLEST_SIDE:
        raise DataError(
            f"expected grids of at least 4 x 4 cells, found {height} x {width} in {printable(path)}; cut larger regions"
        )
    return height, width


def read_cells(path: Path, order: str = "yx", shape: tuple[int, int] | None = None, region: int = 0) -> Tensor:
    """The cells of one feature grid, row-major.

    Args:
        path: ``.pt`` file.
        order: ``yx`` for row-major rows, ``xy`` for column-major ones.
        shape: ``(h, w)``, or None for a square grid.
        region: Which region, where the file contains several.

    Returns:
        ``(h * w, D)`` float32 tensor, a copy of the file's values.

    Raises:
        DataError: If the file is not such a grid, or contains values that are not finite.
        ConfigError: If ``order`` is unknown.
    """
    if order not in ORDERS:
        raise ConfigError(f"expected grid_order yx or xy, found '{order}'")
    grids = open_grids(path, shape)
    if region >= len(grids):
        raise DataError(f"expected region {region} in {printable(path)}, found only {len(grids)}; was it replaced?")
    rows = grids[region]  # (T, D)
    height, width = grid_shape(path, rows.shape[0], shape)
    if order == "xy":
        rows = rows.unflatten(0, (width, height)).transpose(0, 1).flatten(0, 1)  # (h * w, D)
    cells = rows.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if not bool(torch.isfinite(cells).all()):
        raise DataError(f"expected finite features in {printable(path)}, found NaN or infinity; extract it again")
    return cells


def read_grid(path: Path, order: str = "yx", shape: tuple[int, int] | None = None, region: int = 0) -> Tensor:
    """One feature grid as an image of D channels: the result of :func:`read_cells` as ``(D, h, w)``."""
    cells = read_cells(path, order, shape, region)
    return cells.unflatten(0, grid_shape(path, len(cells), shape)).permute(2, 0, 1).contiguous()  # (D, h, w)


@dataclass(frozen=True)
class GridEntry:
    """One file of feature grids and what ``regions.csv`` records of it."""

    path: Path
    slide_id: str | None = None
    shape: tuple[int, int] | None = None
    tissue: np.ndarray | None = None


@dataclass(frozen=True)
class Survey:
    """Shapes of the grids in the files of a folder.

    Attributes:
        regions: Number of regions in each file; 1 for a file that is not a grid.
        bad: Indices of the files that are not grids.
        height: Rows of cells of every grid.
        width: Columns of cells of every grid.
        dim: D of every grid.
    """

    regions: list[int]
    bad: list[int]
    height: int
    width: int
    dim: int


def survey(
    root: Path, entries: Sequence[GridEntry], on_file: Callable[[], None] = lambda: None, max_bad_fraction: float = 0.0
) -> Survey:
    """Open every file, without reading its values.

    Args:
        root: The folder, for messages.
        entries: Its files.
        on_file: Called after each checked file, for a progress bar.
        max_bad_fraction: Largest fraction of the files that may not be grids.

    Raises:
        DataError: If more files than that are not grids, or D or the shape differ within the folder.
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
        on_file()
    check_bad_fraction(entries, bad, max_bad_fraction)
    if len(kinds) != 1:
        found = "; ".join(f"D={d}, {h} x {w} in {printable(path.name)}" for (d, h, w), path in list(kinds.items())[:3])
        raise DataError(f"expected grids of one D and one shape in {root}, found {found or 'none'}; split the folder")
    ((dim, height, width),) = kinds
    return Survey(regions, bad, height, width, dim)


def _kind(entry: GridEntry) -> tuple[int, int, tuple[int, int]]:
    """Regions, D, and (h, w) of a file."""
    regions, cells, dim = open_grids(entry.path, entry.shape).shape
    return regions, dim, grid_shape(entry.path, cells, entry.shape)


def check_bad_fraction(entries: Sequence[GridEntry], bad: Sequence[int], max_bad_fraction: float) -> None:
    """Check that few enough files are not grids.

    Raises:
        DataError: If more than ``max_bad_fraction`` of the files are not; its message describes the first of them.
    """
    if len(bad) <= max_bad_fraction * len(entries):
        return
    more = f" (and {len(bad) - 1} more such files)" if len(bad) > 1 else ""
    raise DataError(
        f"{_reason(entries[bad[0]])}{more}; more than training.max_bad_fraction={max_bad_fraction:g} of the files"
    )


def _reason(entry: GridEntry) -> str:
    try:
        _kind(entry)
    except DataError as error:
        return str(error)
    return f"expected a grid in {printable(entry.path)}, found a file that has changed meanwhile; start again"
