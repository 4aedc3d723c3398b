"""Attention over slides for the viewer, as ``dino attention`` wrote it: coloured tiles of its pyramids, and values.

A map is shown as it was computed, one px for each token of level 1, so that the page places it by the size of a token
alone. Its colours are drawn here, because a browser cannot decode float TIFF files.
"""

import io
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from dino.environment import import_extra
from dino.errors import DataError
from dino.extraction.catalogue import Catalogue
from dino.extraction.map_record import MAP_RECORD, REGION, made_by, other_model, other_models
from dino.extraction.pyramid import NS, SUFFIX, parsed_description, read_description
from dino.extraction.record import read_record
from dino.slides.tables import RegionRecord
from dino.viewer.pixels import Kept

# viridis at eleven places (matplotlib), as in overlay.js.
VIRIDIS = ((68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140))
VIRIDIS += ((34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37))
RANGE = (1.0, 99.0)  # percentiles of a map that get the first and the last colour
RANGE_SIDE = 2048  # the percentiles are those of the finest level of at most that side
LEVELS = 255  # colours of a map; the first entry of the palette is transparent
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # of a damaged file: the error here says it

# What is measured of a tile, by the channel, which is a mean over heads: its name, and whether it is the maximum or the
# mean. Within a tile, the mean of level 1 is 1, and with it that of the product is the attention of level 2.
MEASURED = {
    "tile": ("within the tile: Max", True),
    "region": ("within the region: Mean", False),
    "tile x region": ("both levels: Max", True),
}


@dataclass(frozen=True)
class MapFile:
    """One file of ``dino attention``.

    Attributes:
        path: The file.
        names: Names of its channels.
        sizes: ``(width, height)`` of each level, the finest first.
        tile_px: Side of its tiles.
        px_lv0: Side of a px of the finest level in level-0 px of the slide.
        ranges: Values of each channel that get the first and the last colour.
        made_by: The models, by name and fingerprint.
        file: tifffile's object, used by one thread at a time.
        lock: For that.
    """

    path: Path
    names: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    tile_px: int
    px_lv0: float
    ranges: Sequence[tuple[float, float]]
    made_by: str
    file: Any
    lock: threading.Lock

    def values(self, channel: int, level: int, column: int, row: int) -> np.ndarray:
        """A tile of a level, float32 ``(h, w)``; NaN where nothing is known."""
        with self.lock:
            page = self.file.series[0].levels[level].pages[channel]
            number = row * -(-self.sizes[level][0] // self.tile_px) + column
            self.file.filehandle.seek(page.dataoffsets[number])
            content = self.file.filehandle.read(page.databytecounts[number])
            found, _, shape = page.decode(content, number)
        width, height = (
            min(self.tile_px, side - self.tile_px * place)
            for side, place in zip(self.sizes[level], (column, row), strict=True)
        )
        if found is None:  # tifffile writes nothing for a tile of zeros
            return np.zeros((height, width), np.float32)
        return np.asarray(found).reshape(shape)[0, :height, :width, 0]


class AttentionFiles:
    """The files of ``dino attention`` in one folder.

    Args:
        catalogue: The ROOT.
        folder: Folder of ``SLIDE.ome.tif``.
        open_files: Maximum number of open files.
        cache_mb: Maximum size of the encoded pictures that are kept.

    Raises:
        ConfigError: If tifffile is not installed.
        DataError: If there is no file of a slide of ROOT, or the record in the folder is damaged.

    Attributes:
        record: What made the maps; empty if that is not recorded, as in earlier versions.
    """

    def __init__(self, catalogue: Catalogue, folder: Path, open_files: int = 16, cache_mb: int = 32) -> None:
        import_extra("tifffile", "maps of slides", "maps")
        self._catalogue, self._folder, self._open_files = catalogue, folder, open_files
        self._open: OrderedDict[str, MapFile] = OrderedDict()
        self._lock, self._pictures = threading.Lock(), Kept(cache_mb)
        known = catalogue.slides.status
        self._paths = {slide: path for slide in known if (path := folder / f"{slide}{SUFFIX}").is_file()}
        if not self._paths:
            raise DataError(
                f"expected maps of the slides of {catalogue.root} in {folder}, as `dino attention` writes them "
                f"(SLIDE{SUFFIX}), found none"
            )
        self.record = read_record(folder / MAP_RECORD) or read_description(next(iter(self._paths.values())))

    @property
    def made_by(self) -> str:
        """The models, by name and fingerprint."""
        return made_by(self.record)

    def check_made_by(self, model: Mapping[str, Any], source: str, level_2: bool = False) -> None:
        """Check that the maps are of a model, where that is recorded.

        Args:
            model: What is recorded of it, with its ``fingerprint``.
            source: What is of that model, for the message.
            level_2: Whether it is the level-2 model, of which there may be no maps, or the level-1 model.

        Raises:
            DataError: If they are of another model.
        """
        if found := other_model((self.record.get(REGION) or {}) if level_2 else self.record, model):
            raise DataError(
                f"expected maps of the model of {source} in {self._folder}, found those of another model "
                f"({'; '.join(found)}); move that folder away, or write the maps again with `dino attention`"
            )

    @property
    def slide_ids(self) -> Sequence[str]:
        """Slides with a map."""
        return list(self._paths)

    def describe(self, slide_id: str) -> dict[str, Any]:
        """Channels with their ranges, levels and places of a slide's maps, for the page.

        Raises:
            DataError: If there is none, or its file is damaged or of another slide.
        """
        found = self._opened(slide_id)
        channels = [
            {"name": name, "low": low, "high": high}
            for name, (low, high) in zip(found.names, found.ranges, strict=True)
        ]
        places = {"sizes": found.sizes, "tile_px": found.tile_px, "px_lv0": found.px_lv0}
        return {"channels": channels, "made_by": found.made_by, **places}

    def picture(self, slide_id: str, channel: int, level: int, column: int, row: int) -> bytes:
        """A tile of a map as PNG in colours, transparent where nothing is known.

        Args:
            slide_id: The slide.
            channel: Number of the channel.
            level: Level of the pyramid, 0 for one px per token.
            column: Column of the tile.
            row: Row of the tile.

        Raises:
            DataError: If there is no such tile, or the file is damaged.
        """
        found = self._opened(slide_id)
        if not (channel < len(found.names) and level < len(found.sizes)):
            raise DataError(
                f"expected one of {len(found.names)} channels and {len(found.sizes)} levels, found {channel}, {level}"
            )
        columns, rows = (-(-side // found.tile_px) for side in found.sizes[level])
        if not (column < columns and row < rows):
            raise DataError(f"expected a tile of {columns} x {rows}, found column {column}, row {row}")

        def make() -> bytes:
            return coloured(_values(found, channel, level, column, row), *found.ranges[channel])

        return self._pictures.get((slide_id, channel, level, column, row), make)

    def measurements(self, slide_id: str, encoder: str) -> dict[str, np.ndarray]:
        """Attention of each tile of a slide, relative to uniform attention: what :data:`MEASURED` lists.

        Args:
            slide_id: The slide.
            encoder: Name of the encoder, for the names.

        Returns:
            ``(N,)`` float64 by name, in the order of the catalogue, NaN where nothing is known; none without a map.

        Raises:
            DataError: If the file is damaged or of another slide.
        """
        tiles = self._catalogue.tiles.get(slide_id)
        if slide_id not in self._paths or tiles is None:
            return {}
        found, measured = self._opened(slide_id), {}
        for channel, name in enumerate(found.names):
            mean_over_heads = name.removesuffix(" rollout")
            if mean_over_heads in MEASURED:
                what, maximum = MEASURED[mean_over_heads]
                kind = name.removeprefix(mean_over_heads)
                values = _of_squares(found, channel, tiles.coords, tiles.step_lv0, _maximum if maximum else _mean)
                measured[f"Attention{kind} {encoder}: {what}"] = values
        return measured

    def region(self, slide_id: str, record: RegionRecord) -> np.ndarray | None:
        """Attention of level 2 over the cells of a region, averaged over all mapped regions that have a cell.

        Args:
            slide_id: The slide.
            record: The region.

        Returns:
            ``(C, h, w)`` float64, NaN where nothing is known: the mean over heads, then each head (of rollout the first
            only). None without a map of level 2.

        Raises:
            DataError: If the file is damaged or of another slide.
        """
        if slide_id not in self._paths:
            return None
        found, (height, width), step = self._opened(slide_id), record.grid, record.step_lv0
        y, x = np.indices((height, width)).reshape(2, -1) * step  # (2, h * w), row-major
        corners = np.stack([x + record.x, y + record.y], 1)
        channels = [i for i, name in enumerate(found.names) if name.startswith("region")]
        maps = [_of_squares(found, channel, corners, step, _mean) for channel in channels]
        return np.reshape(maps, (len(maps), height, width)) if maps else None

    def _opened(self, slide_id: str) -> MapFile:
        if slide_id not in self._paths:
            raise DataError(f"expected a map of slide '{slide_id}', found none; run `dino attention`")
        with self._lock:
            if slide_id in self._open:
                self._open.move_to_end(slide_id)
                return self._open[slide_id]
        opened = self._read(slide_id)
        with self._lock:
            opened = self._open.setdefault(slide_id, opened)
            while len(self._open) > self._open_files:
                self._open.popitem(last=False)  # closed with its last reference: another thread may be reading
        return opened

    def _read(self, slide_id: str) -> MapFile:
        import tifffile

        path, status = self._paths[slide_id], self._catalogue.slides.status[slide_id]
        try:
            file: Any = tifffile.TiffFile(path)
            series: Any = file.series[0]
            pixels = ElementTree.fromstring(file.ome_metadata or "").find(f".//{NS}Pixels")
            assert pixels is not None and series.axes in ("CYX", "YX")  # YX: one channel, as of rollout
            spacing = float(pixels.attrib["PhysicalSizeX"])
            names = [str(one.get("Name", i)) for i, one in enumerate(pixels.findall(f"{NS}Channel"))]
            sizes = [(level.shape[-1], level.shape[-2]) for level in series.levels]
            assert len(names) == len(series.pages)
            reduced = next((i for i, size in enumerate(sizes) if max(size) <= RANGE_SIDE), len(sizes) - 1)
            ranges = [value_range(page.asarray()) for page in series.levels[reduced].pages]
            tile_px = int(series.levels[0].pages[0].tilewidth)
        except Exception as error:  # tifffile and the XML parser raise many types
            raise _unreadable(path, error) from None
        models = self._made_by(path, parsed_description(file.ome_metadata))
        px_lv0 = self._px_lv0(slide_id, spacing / status.spacing_um if status.spacing_um else 0.0, sizes[0])
        return MapFile(path, names, sizes, tile_px, px_lv0, ranges, models, file, threading.Lock())

    def _made_by(self, path: Path, own: Mapping[str, Any]) -> str:
        """The models of a file, which must be those of its folder.

        Raises:
            DataError: If they are not.
        """
        if found := other_models(self.record, own):
            raise DataError(
                f"expected maps of the same models in {self._folder}, found others in {path.name}: "
                f"{'; '.join(found)}; move it away, or write it again with `dino attention`"
            )
        return made_by(own or self.record)

    def _px_lv0(self, slide_id: str, rounded: float, size: tuple[int, int]) -> float:
        """Side of a px in level-0 px: an exact fraction of a tile, which the spacings give rounded only."""
        tiles, status = self._catalogue.tiles.get(slide_id), self._catalogue.slides.status[slide_id]
        step = tiles.step_lv0 if tiles is not None else 0
        tokens = round(step / rounded) if rounded else 0
        sides = (status.width, status.height)
        if not tokens or any(px % tokens or px // tokens > side // step for px, side in zip(size, sides, strict=True)):
            raise DataError(
                f"expected maps of slide '{slide_id}' as it was tiled, found {size[0]} x {size[1]} values; write them "
                "again with `dino attention`"
            )
        return step / tokens


def _values(file: MapFile, channel: int, level: int, column: int, row: int) -> np.ndarray:
    """:meth:`MapFile.values`.

    Raises:
        DataError: If the file is damaged.
    """
    try:
        return file.values(channel, level, column, row)
    except Exception as error:  # of tifffile and of the decompression
        raise _unreadable(file.path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error) or type(error).__name__
    return DataError(f"expected maps of `dino attention` in {path}, could not read them ({reason}); write them again")


def _of_squares(
    file: MapFile, channel: int, coords: np.ndarray, side_lv0: int, statistic: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """A statistic of the finest level over squares; two rows of the file's tiles are in memory.

    Args:
        file: The file.
        channel: Number of the channel.
        coords: ``(N, 2)`` first corners of the squares in level-0 px.
        side_lv0: Their side in level-0 px.
        statistic: ``(h, n, w)`` to ``(n,)``; NaN where nothing is known.

    Returns:
        ``(N,)`` float64.

    Raises:
        DataError: If the file is damaged.
    """
    width, height = file.sizes[0]
    side = round(side_lv0 / file.px_lv0)
    missing = ((0, 0), (0, side))  # overlapping tiles can end right of the last cell

    @lru_cache(maxsize=2)  # squares can lie across two rows
    def strip(row: int) -> np.ndarray:
        parts = [_values(file, channel, 0, column, row) for column in range(-(-width // file.tile_px))]
        return np.pad(np.concatenate(parts, 1), missing, constant_values=np.nan)

    found = np.full(len(coords), np.nan)
    corners = np.round(coords / file.px_lv0).astype(np.int64)  # (N, 2) column, row
    for top in np.unique(corners[:, 1]).tolist():
        bottom = min(top + side, height)
        if top >= bottom:
            continue
        first, last = top // file.tile_px, (bottom - 1) // file.tile_px
        rows = np.concatenate([strip(row) for row in range(first, last + 1)])
        rows = rows[top - first * file.tile_px : bottom - first * file.tile_px]
        chosen = np.flatnonzero(corners[:, 1] == top)
        windows = np.lib.stride_tricks.sliding_window_view(rows, side, axis=1)  # (h, width + 1, side)
        found[chosen] = statistic(windows[:, corners[chosen, 0]])
    return found


def _maximum(values: np.ndarray) -> np.ndarray:
    return np.fmax.reduce(values, axis=(0, 2))  # of those that are known


def _mean(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return np.where(known, values, 0).sum((0, 2), dtype=np.float64) / known.sum((0, 2))


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Values that get the first and the last colour; (0, 1) where nothing is known."""
    known = values[np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, RANGE)
    return float(low), float(high)


def coloured(values: np.ndarray, low: float, high: float) -> bytes:
    """Values ``(h, w)`` as PNG in viridis, transparent where they are NaN."""
    known = np.isfinite(values)
    scaled = np.clip((np.where(known, values, low) - low) / (high - low or 1.0), 0.0, 1.0)
    indices = np.where(known, 1 + np.round(scaled * (LEVELS - 1)), 0).astype(np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette(_palette().tobytes())
    content = io.BytesIO()
    picture.save(content, "PNG", transparency=0, compress_level=1)
    return content.getvalue()


def _palette() -> np.ndarray:
    """``(256, 3)`` uint8: black for what is transparent, then the colours."""
    places = np.linspace(0, len(VIRIDIS) - 1, LEVELS)
    stops = np.array(VIRIDIS, float)
    colours = np.stack([np.interp(places, np.arange(len(VIRIDIS)), stops[:, i]) for i in range(3)], 1)
    return np.concatenate([np.zeros((1, 3)), np.round(colours)]).astype(np.uint8)
