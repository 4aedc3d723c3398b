"""Maps of values on slides as pyramidal OME-TIFF files, which QuPath, napari and Bio-Formats open in place."""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from dino.environment import import_extra
from dino.files import atomic_path

SUFFIX = ".ome.tif"
TILE = 256  # side of the tiles of the file
SMALLEST = 512  # the last level is at most this large


def write_pyramid(
    path: Path,
    channels: Callable[[], Iterator[np.ndarray]],
    names: Sequence[str],
    size: tuple[int, int],
    um_per_px: float,
    offset_um: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Write maps of one size as channels of an OME-TIFF, with levels of half the size each; memory is that of two maps.

    Args:
        path: The file, written atomically.
        channels: Returns the maps one by one, ``(H, W)`` float32 with NaN where nothing is known; called once for each
            level.
        names: Their names.
        size: ``(H, W)``.
        um_per_px: Spacing of the maps in µm per px.
        offset_um: ``(x, y)`` of their first px on the slide in µm.

    Raises:
        ConfigError: If tifffile is not installed.
        OSError: If the file cannot be written.
    """
    tifffile = import_extra("tifffile", "maps of slides", "maps")
    levels = [size]
    while max(levels[-1]) > SMALLEST:
        levels.append((-(-levels[-1][0] // 2), -(-levels[-1][1] // 2)))
    unit = {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    metadata = {
        **{"axes": "CYX", "Channel": {"Name": list(names)}, **unit},
        **{"PhysicalSizeX": um_per_px, "PhysicalSizeY": um_per_px},
        "Plane": {"PositionX": [offset_um[0]] * len(names), "PositionY": [offset_um[1]] * len(names)},
    }
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True, ome=True) as file:
        for number, (height, width) in enumerate(levels):
            file.write(
                _tiles(channels(), number),
                shape=(len(names), height, width),
                dtype=np.float32,
                tile=(TILE, TILE),
                compression="zlib",
                photometric="minisblack",
                subifds=len(levels) - 1 if number == 0 else None,
                subfiletype=1 if number else 0,
                metadata=metadata if number == 0 else None,
            )


def halved(values: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 values, of those that are known: ``(H, W)`` to ``(ceil(H / 2), ceil(W / 2))``."""
    strips = (values[row : row + TILE] for row in range(0, values.shape[0], TILE))  # copies are those of a strip
    return np.concatenate([_halved(strip) for strip in strips])


def _halved(values: np.ndarray) -> np.ndarray:
    height, width = (-(-side // 2) for side in values.shape)
    missing = ((0, 2 * height - values.shape[0]), (0, 2 * width - values.shape[1]))
    blocks = np.pad(values, missing, constant_values=np.nan).reshape(height, 2, width, 2)
    known = np.isfinite(blocks)
    count = known.sum(axis=(1, 3))
    return (np.where(known, blocks, 0).sum(axis=(1, 3)) / np.where(count > 0, count, np.nan)).astype(np.float32)


def _tiles(channels: Iterator[np.ndarray], level: int) -> Iterator[np.ndarray]:
    """The tiles of all channels of a level, row by row."""
    for values in channels:
        shown = reduce(lambda finer, _: halved(finer), range(level), values)
        for row in range(0, shown.shape[0], TILE):
            for column in range(0, shown.shape[1], TILE):
                yield shown[row : row + TILE, column : column + TILE]
