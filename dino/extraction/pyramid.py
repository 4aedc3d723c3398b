"""Maps of values on slides as pyramidal OME-TIFF files, which QuPath, napari and Bio-Formats open in place."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from dino.environment import import_extra
from dino.files import atomic_path

SUFFIX = ".ome.tif"
NS = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
TILE = 256  # side of the tiles of the file
SMALLEST = 512  # the last level is at most this large


def write_pyramid(
    path: Path,
    channels: Callable[[], Iterator[np.ndarray]],
    names: Sequence[str],
    size: tuple[int, int],
    um_per_px: float,
    *,
    record: Mapping[str, Any] | None = None,
    colours: np.ndarray | None = None,
) -> None:
    """Write maps of one size as channels of an OME-TIFF, with levels of half the size each; memory is that of two maps.

    Args:
        path: The file, written atomically.
        channels: Returns the maps one by one, ``(H, W)``; called once for each level: float32 with NaN where nothing is
            known, or with ``colours`` uint8 labels.
        names: Their names.
        size: ``(H, W)``.
        um_per_px: Spacing of the maps in µm per px; their first px is the first corner of the slide.
        record: What made them, stored as JSON in the description of the image.
        colours: ``(n, 3)`` uint8 RGB of the labels from 0 on, stored as the colour table; None for maps of numbers.

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
        "Plane": {"PositionX": [0.0] * len(names), "PositionY": [0.0] * len(names)},
        **({"Description": json.dumps(record, default=str)} if record else {}),
    }
    dtype, smaller, look = np.float32, halved, {"photometric": "minisblack"}
    if colours is not None:
        dtype, smaller = np.uint8, halved_labels
        look = {"photometric": "palette", "colormap": _colour_table(colours)}
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True, ome=True) as file:
        for number, (height, width) in enumerate(levels):
            file.write(
                _tiles(channels(), number, smaller),
                shape=(len(names), height, width),
                dtype=dtype,
                tile=(TILE, TILE),
                compression="zlib",
                subifds=len(levels) - 1 if number == 0 else None,
                subfiletype=1 if number else 0,
                metadata=metadata if number == 0 else None,
                **look,
            )


def halved_labels(values: np.ndarray) -> np.ndarray:
    """The most frequent of 2 x 2 labels, of equally frequent ones the first: ``(H, W)`` as in :func:`halved`."""
    height, width = (-(-side // 2) for side in values.shape)
    padded = np.pad(values, ((0, 2 * height - values.shape[0]), (0, 2 * width - values.shape[1])), mode="edge")
    four = padded.reshape(height, 2, width, 2).transpose(1, 3, 0, 2).reshape(4, height, width)
    counts = np.stack([(four == one).sum(0) for one in four])  # (4, h, w)
    return np.take_along_axis(four, counts.argmax(0)[None], 0)[0]


def _colour_table(colours: np.ndarray) -> np.ndarray:
    """``(3, 256)`` uint16, as TIFF 6.0 has it; black for labels without a colour."""
    table = np.zeros((3, 256), np.uint16)
    table[:, : len(colours)] = 257 * colours.T.astype(np.uint16)
    return table


def read_description(path: Path) -> dict[str, Any]:
    """The record in a file of maps; empty if there is no such file, or none in it, as of earlier versions.

    Raises:
        ConfigError: If tifffile is not installed.
    """
    tifffile = import_extra("tifffile", "maps of slides", "maps")
    try:
        with tifffile.TiffFile(path) as file:
            return parsed_description(file.ome_metadata)
    except Exception:  # tifffile raises many types: no file, or a damaged one
        return {}


def parsed_description(ome: str | None) -> dict[str, Any]:
    """The record in the OME-XML of a file; empty if it has none."""
    try:
        content = json.loads(ElementTree.fromstring(ome or "").findtext(f"{NS}Image/{NS}Description") or "")
    except (ElementTree.ParseError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


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


def _tiles(
    channels: Iterator[np.ndarray], level: int, smaller: Callable[[np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    """The tiles of all channels of a level, row by row; ``smaller`` gives the next level."""
    for values in channels:
        shown = reduce(lambda finer, _: smaller(finer), range(level), values)
        for row in range(0, shown.shape[0], TILE):
            for column in range(0, shown.shape[1], TILE):
                yield shown[row : row + TILE, column : column + TILE]
