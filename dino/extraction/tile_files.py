"""Tile files: the features of all tiles of a slide in one HDF5 file, in the layout that CLAM and TRIDENT read.

``features`` (N, D), ``coords`` (N, 2) int64 level-0 px with their attributes, optionally ``patches`` (N, h, w, D).
All are contiguous: a row is read with one read. The rows are written where they belong as soon as they are computed,
with plain writes, so that the memory needed does not depend on the number of tiles and a full disk is an error of the
operating system (HDF5 reports it late, and not as one).
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino.errors import DataError
from dino.files import atomic_path
from dino.slides.tables import SlideStatus, SlideTiles

STORAGE = {"fp32": torch.float32, "fp16": torch.float16}
OBJECTIVES = (1.25, 2, 4, 5, 10, 20, 40, 60, 80)


@dataclass(frozen=True)
class Layout:
    """Shape and type of a row.

    Attributes:
        dim: D of ``features``.
        storage: Their type, ``fp32`` or ``fp16``.
        patches: (h, w, D) of ``patches``, which are fp16; None without.
    """

    dim: int
    storage: str = "fp32"
    patches: tuple[int, int, int] | None = None

    @property
    def rows(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of a row of each dataset but the coordinates."""
        features = {"features": ((self.dim,), STORAGE[self.storage])}
        return features | ({"patches": (self.patches, torch.float16)} if self.patches else {})

    @property
    def row_bytes(self) -> int:
        """Size of a row of all datasets."""
        return sum(int(np.prod(shape)) * kind.itemsize for shape, kind in self.rows.values()) + 16


class TileFile:
    """A tile file while it is written.

    Args:
        path: The file, with its datasets allocated.
        offsets: Where in the file the data of each dataset begin.
        layout: Its rows.
        count: Number of rows.
    """

    def __init__(self, path: Path, offsets: Mapping[str, int], layout: Layout, count: int) -> None:
        self._file = path.open("r+b", buffering=0)
        self._offsets, self._layout = offsets, layout
        self._absent = np.ones(count, bool)

    def write(self, rows: np.ndarray, features: Tensor) -> None:
        """Write rows.

        Args:
            rows: ``(n,)`` indices.
            features: ``(n, D)`` float32; with ``patches`` ``(n, 1 + h w, D)``, the cls token first.

        Raises:
            DataError: If a value is too large for fp16.
        """
        parts = {"features": features[:, 0], "patches": features[:, 1:]} if self._layout.patches else {}
        for name, values in (parts or {"features": features}).items():
            kind = self._layout.rows[name][1]
            stored = values.to(kind)
            if kind == torch.float16 and not stored.isfinite().all():
                raise DataError(
                    f"expected features that fp16 can hold (below 65,504), found {float(values.abs().max()):.3g}; use "
                    "storage=fp32 (patch tokens are always fp16)"
                )
            self._write(name, rows, np.ascontiguousarray(stored.flatten(1).numpy()))
        self._absent[rows] = False

    def _write(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Write consecutive rows at once."""
        if not len(rows):
            return
        size = values[0].nbytes
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            data = memoryview(values[start:stop].tobytes())
            position = self._offsets[name] + int(rows[start]) * size
            while data:
                count = os.pwrite(self._file.fileno(), data, position)
                data, position = data[count:], position + count

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def check_complete(self) -> None:
        """Raise RuntimeError if a row was not written."""
        if self._absent.any():
            raise RuntimeError(f"{int(self._absent.sum())} rows of {self._file.name} were not written")


@contextmanager
def create(
    path: Path, coords: np.ndarray, layout: Layout, attributes: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[TileFile]:
    """A new tile file, which gets its name when the block ends without an error and all rows are written.

    Args:
        path: The ``.h5``; its folder must exist.
        coords: ``(N, 2)`` level-0 px.
        layout: Its rows.
        attributes: Attributes of the coordinates.
        model: Attributes of the features and the file, which identify the model.
    """
    with atomic_path(path, make_folder=False) as temporary:
        offsets = _allocate(temporary, coords, layout, attributes, model)
        file = TileFile(temporary, offsets, layout, len(coords))
        try:
            yield file
            file.check_complete()
        finally:
            file.close()


def is_written(path: Path, coords: np.ndarray, layout: Layout) -> bool:
    """Whether ``path`` contains rows of this layout for exactly these tiles."""
    import h5py

    if not path.is_file():
        return False
    try:
        with h5py.File(path, "r") as file:
            found = {name: (data.shape, data.dtype) for name, data in file.items() if name != "coords"}
            wanted = {
                name: ((len(coords), *shape), np.dtype(f"<f{kind.itemsize}"))
                for name, (shape, kind) in layout.rows.items()
            }
            return found == wanted and np.array_equal(file["coords"][:], coords)  # type: ignore[index]
    except (OSError, KeyError, AttributeError, RuntimeError):  # damaged: it is written again
        return False


def _allocate(
    path: Path, coords: np.ndarray, layout: Layout, attributes: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, int]:
    """Write all but the features; returns where in the file those begin."""
    import h5py

    try:
        with h5py.File(path, "w") as file:
            creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            creation.set_layout(h5py.h5d.CONTIGUOUS)
            creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            for name, (shape, kind) in layout.rows.items():
                dtype = np.dtype(f"<f{kind.itemsize}")
                file.create_dataset(name, (len(coords), *shape), dtype, dcpl=creation.copy())
            stored = file.create_dataset("coords", data=coords.astype(np.int64))
            file["features"].attrs.update(model)
            stored.attrs.update(attributes)
            file.attrs.update(model)
            return {name: file[name].id.get_offset() for name in layout.rows}  # type: ignore[union-attr]
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) and error.errno else None
        number = number or (errno.ENOSPC if "No space left" in str(error) else errno.EIO)
        raise OSError(number, os.strerror(number), str(path)) from error


# ---------------------------------------------------------------------------------------------- attributes


def coordinate_attributes(
    step_lv0: int,
    grid: tuple[int, int],
    tile_size_px: int,
    spacing_um: float,
    status: SlideStatus | None,
    actual_spacing_um: float,
) -> dict[str, Any]:
    """The attributes that CLAM and TRIDENT store with coordinates; their "patch" is a tile, or a region of tiles, here.

    ``patch_size`` is its width at the requested spacing and ``patch_size_level0`` at level 0; magnifications are those
    of the objective nearest to 10 / spacing.

    Args:
        step_lv0: Footprint of a tile at level 0.
        grid: ``(h, w)`` tiles.
        tile_size_px: Size of a tile.
        spacing_um: Requested spacing.
        status: The slide.
        actual_spacing_um: Spacing of the pixels.
    """
    attributes: dict[str, Any] = {
        "patch_size": grid[1] * tile_size_px,
        "patch_size_level0": grid[1] * step_lv0,
        "patch_height": grid[0] * tile_size_px,
        "patch_height_level0": grid[0] * step_lv0,
    }
    if np.isfinite(spacing_um):
        attributes |= {"target_magnification": objective(spacing_um), "spacing_um": actual_spacing_um}
    if status is not None:
        attributes |= {"level0_width": status.width, "level0_height": status.height}
        attributes |= {"slide_path": str(status.image_path)}
        if status.spacing_um:
            attributes |= {"level0_magnification": objective(status.spacing_um), "level0_spacing_um": status.spacing_um}
    return attributes


def tile_attributes(
    tiles: SlideTiles, tile_size_px: int, spacing_um: float, overlap: float, status: SlideStatus | None
) -> dict[str, Any]:
    """Attributes of the coordinates of tiles; ``overlap`` is in px of the requested spacing, as in TRIDENT."""
    step, actual = tiles.step_lv0, tiles.spacing_um
    shared = coordinate_attributes(step, (1, 1), tile_size_px, spacing_um, status, actual)
    return {"name": tiles.slide_id, "overlap": round(overlap * tile_size_px), **shared}


def objective(spacing_um: float) -> float:
    """Magnification of the objective nearest to a spacing: 0.25 µm/px is 40, 0.5 is 20."""
    nearest = min(OBJECTIVES, key=lambda power: abs(np.log(power * spacing_um / 10)))
    return int(nearest) if nearest == int(nearest) else nearest
