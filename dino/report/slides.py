"""Reads the data of a report from ROOT and its slides."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino import progress
from dino.data.grids import read_grid
from dino.errors import DataError
from dino.extraction.folders import find_grids, grid_path
from dino.models.grid_source import GridSource
from dino.report.data import RootData, SlideData
from dino.report.figures import Thumbnail
from dino.report.tiles import TileSet
from dino.slides.tables import (
    REGIONS_FOLDER,
    RegionRecord,
    TileRecord,
    read_regions,
    read_slide_tiles,
    read_status,
    read_tiling,
)
from dino.slides.tiled import TiledSlides, slide_paths

THUMBNAIL_PX = 1600  # the longer side
REGION_PX = 512  # side of a region in the report
MAX_MAP_TILES = 2500  # tiles that are embedded for the feature map
SHOWN_REGIONS = 3
NAMED_SLIDES = 5  # in a message


class TiledRoot:
    """The tables of a ROOT.

    Args:
        path: ROOT of `dino tile`.
        moved: Folder or slides.csv of slides that were moved after tiling; None if they were not.

    Raises:
        DataError: If a table is missing or damaged.
    """

    def __init__(self, path: Path, moved: str | None = None) -> None:
        self.path = path
        self.tiling, self.tiles, self.regions = read_tiling(path), read_slide_tiles(path), read_regions(path)
        self.slides = TiledSlides(self.tiling.geometry, read_status(path), slide_paths(moved), self.tiling.reader)

    def data(self) -> RootData:
        """What the tables record of all slides."""
        return RootData(
            status=self.slides.status,
            tiles={slide: len(found.coords) for slide, found in self.tiles.items()},
            regions=Counter(region.slide_id for region in self.regions),
            settings={**self.tiling.settings, "region_size_px": self.tiling.geometry.region_size_px},
        )

    def choose(self, slide_id: str | None) -> str:
        """The slide to show: the named one; else that with the most regions, then the most tiles, whose file is there.

        Raises:
            DataError: If there is no such slide with tiles.
        """
        if slide_id is not None:
            if slide_id not in self.tiles:
                names = ", ".join(list(self.tiles)[:NAMED_SLIDES])
                raise DataError(f"expected slide={slide_id} among the slides with tiles in {self.path}, found {names}")
            return slide_id
        if not self.tiles:
            raise DataError(f"expected slides with tiles in {self.path}, found none")
        regions = self.data().regions

        def rank(slide: str) -> tuple[bool, int, int]:
            return self.slides.path(slide) is not None, regions.get(slide, 0), len(self.tiles[slide].coords)

        return max(self.tiles, key=rank)


@dataclass(frozen=True)
class MapTiles:
    """Tiles of a map of features.

    Attributes:
        corners: Level-0 px, (N, 2): upper left corner of the square that each tile fills.
        square: Side of that square in level-0 px.
        pixels: uint8 (S, S, 3) of each.
        disjoint: Indices of those that do not overlap.
        tiles: These.
    """

    corners: np.ndarray
    square: float
    pixels: Sequence[np.ndarray]
    disjoint: Sequence[int]
    tiles: TileSet


class TiledSlide:
    """One slide under ROOT, with its tiles and regions.

    Args:
        root: The tables of ROOT.
        slide_id: The slide; None for one with many regions and tiles, see :meth:`TiledRoot.choose`.

    Raises:
        DataError: If the slide cannot be read.
    """

    def __init__(self, root: TiledRoot, slide_id: str | None = None) -> None:
        self.root, self.slide_id = root, root.choose(slide_id)
        listed, spacing = root.tiles[self.slide_id], root.tiling.geometry.spacing_um
        self.tiles = [
            TileRecord(self.slide_id, int(x), int(y), listed.step_lv0, spacing, listed.spacing_um, float("nan"))
            for x, y in listed.coords
        ]
        self.regions = [region for region in root.regions if region.slide_id == self.slide_id]
        self.shown_regions = choose_regions(self.regions, SHOWN_REGIONS)
        self.reader = root.slides.open(self.slide_id, listed.step_lv0)

    def close(self) -> None:
        """Close the slide."""
        self.reader.close()

    @property
    def spacing_um(self) -> float:
        """µm per px of the tiles."""
        return self.reader.lattice.spacing_um

    def thumbnail(self) -> Thumbnail:
        """The whole slide."""
        pixels = self.reader.thumbnail(THUMBNAIL_PX)
        downsample = self.reader.lattice.slide_size[0] / pixels.shape[1]
        return Thumbnail(pixels, downsample, downsample * self.reader.spacing_um)

    def data(self) -> SlideData:
        """Thumbnail, tiles and regions."""
        return SlideData(
            slide_id=self.slide_id,
            thumbnail=self.thumbnail(),
            tiles=np.array([(tile.x, tile.y) for tile in self.tiles]).reshape(-1, 2),
            side=self.reader.lattice.step_lv0,
            regions=self.boxes(self.regions),
            shown_regions=self.shown_regions,
        )

    def boxes(self, regions: Sequence[RegionRecord]) -> np.ndarray:
        """Level-0 px, float64 (N, 4): x, y, width, height of regions."""
        return np.array([_box(region) for region in regions], dtype=np.float64).reshape(-1, 4)

    def map_tiles(self, limit: int = MAX_MAP_TILES) -> tuple[list[TileRecord], np.ndarray, float]:
        """Tiles for a map of features.

        For a large slide, only the tiles on the lattice are used, or those of every second, third, ... row and column.

        Args:
            limit: Number of tiles at most.

        Returns:
            The tiles, and the squares that they fill without overlap: upper left corners, (N, 2), and side, in
            level-0 px.
        """
        step, per_step, stride = self.reader.lattice.step_lv0, self.root.tiling.geometry.positions_per_step, 1
        tiles = self.tiles
        if len(tiles) > limit:
            tiles, per_step = [tile for tile in self.tiles if tile.on_lattice], 1
        on_lattice = tiles
        while len(tiles) > limit:
            stride += 1
            tiles = [t for t in on_lattice if not (t.x // step % stride or t.y // step % stride)]
        square = step * stride / per_step
        inset = (step - square) / 2 if stride == 1 else 0.0  # an overlapping tile fills its middle
        return tiles, np.array([(tile.x + inset, tile.y + inset) for tile in tiles]), square

    def read(self, tiles: Sequence[TileRecord]) -> list[np.ndarray]:
        """Pixels of tiles, uint8, (S, S, 3) each."""
        pixels = []
        with progress.bar("tiles for the report", len(tiles)) as bar:
            for tile in tiles:
                pixels.append(self.reader.read_cell(tile.x, tile.y))
                bar.advance()
        return pixels

    def read_map(self, limit: int = MAX_MAP_TILES) -> MapTiles:
        """Read the tiles of a map, see :meth:`map_tiles`.

        Args:
            limit: Number of tiles at most.
        """
        shown, corners, square = self.map_tiles(limit)
        pixels = self.read(shown)
        disjoint = [index for index, tile in enumerate(shown) if tile.on_lattice]
        owner = self.root.slides.status[self.slide_id].patient_id or self.slide_id
        names = [f"{self.slide_id}_{shown[i].x}_{shown[i].y}" for i in disjoint]
        origin = [self.slide_id] * len(names), [owner] * len(names)
        tiles = TileSet([pixels[i] for i in disjoint], names, *origin, self.spacing_um)
        return MapTiles(corners, square, pixels, disjoint, tiles)

    def region_image(self, region: RegionRecord) -> np.ndarray:
        """A region, stitched from its downsampled cells: uint8, about ``REGION_PX`` a side."""
        side = max(8, REGION_PX // max(region.grid))
        rows = []
        for row in range(region.grid[0]):
            cells = [self.reader.read_cell(region.x + c * region.step_lv0, region.y + row * region.step_lv0)
                     for c in range(region.grid[1])]  # fmt: skip
            small = [np.asarray(Image.fromarray(cell).resize((side, side), Image.Resampling.LANCZOS)) for cell in cells]
            rows.append(np.concatenate(small, axis=1))
        return np.concatenate(rows)

    def region_grids(self, order: str, source: GridSource | None) -> tuple[list[RegionRecord], Tensor | None]:
        """The shown regions whose features have been extracted.

        Args:
            order: Order of the rows in files without ``regions.csv``, ``yx`` or ``xy``.
            source: The level-1 model of the features, where known.

        Returns:
            The regions, and their features: float32, (n, D, h, w); None if there are none.
        """
        regions = [self.regions[index] for index in self.shown_regions]
        found = [(r, path) for r, path in zip(regions, self.grid_paths(source, regions), strict=True) if path.exists()]
        grids = [read_grid(path, order, region.grid) for region, path in found]
        return [region for region, _ in found], torch.stack(grids) if grids else None

    def grid_paths(self, source: GridSource | None, regions: Sequence[RegionRecord]) -> list[Path]:
        """Where features of regions are, those of a level-1 model where there are several.

        Raises:
            DataError: If it is not known which are meant.
        """
        folder = find_grids(self.root.path, expected=source) or self.root.path / REGIONS_FOLDER
        return [grid_path(folder, region) for region in regions]


def choose_regions(regions: Sequence[RegionRecord], count: int) -> list[int]:
    """Indices of regions with much tissue and little overlap, chosen greedily."""
    gain = {index: float(region.tissue.mean()) for index, region in enumerate(regions)}
    chosen: list[int] = []
    while gain and len(chosen) < count:
        chosen.append(max(gain, key=lambda i: gain[i]))
        del gain[chosen[-1]]
        gain = {i: value * (1 - _overlap(regions[i], regions[chosen[-1]])) for i, value in gain.items()}
    return chosen


def _box(region: RegionRecord) -> tuple[int, int, int, int]:
    """Level-0 ``(x, y, width, height)`` of a region."""
    return region.x, region.y, region.grid[1] * region.step_lv0, region.grid[0] * region.step_lv0


def _overlap(first: RegionRecord, second: RegionRecord) -> float:
    """Fraction of a region that another region of the same size covers."""
    _, _, width, height = _box(first)
    across, down = 1 - abs(first.x - second.x) / width, 1 - abs(first.y - second.y) / height
    return max(0.0, across) * max(0.0, down)
