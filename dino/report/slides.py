"""Reads the data of a report from ROOT and its slides."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino import progress
from dino.data.grids import read_grid
from dino.extraction.folders import find_grids, grid_path
from dino.models.grid_source import GridSource
from dino.report.figures import Thumbnail
from dino.report.sections import SlideData
from dino.slides.partitions import PRETRAIN
from dino.slides.reader import SlideReader
from dino.slides.tables import (
    OK,
    REGIONS_FOLDER,
    RegionRecord,
    TileRecord,
    read_regions,
    read_status,
    read_tiles,
    read_tiling,
)

THUMBNAIL_PX = 1600  # the longer side
REGION_PX = 512  # side of a region in the report
MAX_MAP_TILES = 2500  # tiles that are embedded for the feature map
SHOWN_REGIONS = 3


class TiledSlide:
    """The slide under ROOT that the report shows: the one with the most regions, then the most tiles.

    Args:
        root: ROOT of `dino tile`.

    Raises:
        DataError: If ROOT or the slide cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tiling, self.status = read_tiling(root), read_status(root)
        self.all_tiles, self.all_regions = read_tiles(root), read_regions(root)
        chosen = max(self.status.values(), key=lambda s: (s.status == OK, s.regions, s.tiles))
        self.slide_id = chosen.slide_id
        self.tiles = [tile for tile in self.all_tiles if tile.slide_id == self.slide_id]
        self.regions = [region for region in self.all_regions if region.slide_id == self.slide_id]
        self.shown_regions = choose_regions(self.regions, SHOWN_REGIONS)
        self.reader = SlideReader(chosen.image_path, self.tiling.geometry, spacing_at_level_0=chosen.spacing_um)

    def close(self) -> None:
        """Close the slide."""
        self.reader.close()

    @property
    def spacing_um(self) -> float:
        """µm per px of the tiles."""
        return self.reader.lattice.spacing_um

    def data(self) -> SlideData:
        """Thumbnail, tiles and regions."""
        pixels = self.reader.thumbnail(THUMBNAIL_PX)
        downsample = self.reader.lattice.slide_size[0] / pixels.shape[1]
        regions = [(r.x, r.y, r.grid[1] * r.step_lv0, r.grid[0] * r.step_lv0) for r in self.regions]
        return SlideData(
            slide_id=self.slide_id,
            thumbnail=Thumbnail(pixels, downsample, downsample * self.reader.spacing_um),
            tiles=np.array([(tile.x, tile.y) for tile in self.tiles]).reshape(-1, 2),
            side=self.reader.lattice.step_lv0,
            regions=np.array(regions, dtype=np.float64).reshape(-1, 4),
            shown_regions=self.shown_regions,
            um_per_px=self.spacing_um,
            slides=sum(row.status == OK for row in self.status.values()),
            all_tiles=len(self.all_tiles),
            all_regions=len(self.all_regions),
            held_out=self._held_out(),
            settings={**self.tiling.settings, "region_size_px": self.tiling.geometry.region_size_px},
        )

    def _held_out(self) -> tuple[int, int, int]:
        """Numbers of slides, tiles and regions that are held out from pretraining."""
        slides = {row.slide_id for row in self.status.values() if row.status == OK and row.partition not in PRETRAIN}
        tiles = sum(tile.slide_id in slides for tile in self.all_tiles)
        return len(slides), tiles, sum(region.slide_id in slides for region in self.all_regions)

    def map_tiles(self) -> tuple[list[TileRecord], np.ndarray, float]:
        """Tiles for a map of features, at most ``MAX_MAP_TILES``.

        For a large slide, only the tiles on the lattice are used, or those of every second, third, ... row and column.

        Returns:
            The tiles, and the squares that they fill without overlap: upper left corners, (N, 2), and side, in
            level-0 px.
        """
        step, per_step, stride = self.reader.lattice.step_lv0, self.tiling.geometry.positions_per_step, 1
        tiles = self.tiles
        if len(tiles) > MAX_MAP_TILES:
            tiles, per_step = [tile for tile in self.tiles if tile.on_lattice], 1
        on_lattice = tiles
        while len(tiles) > MAX_MAP_TILES:
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
        folder = find_grids(self.root, expected=source) or self.root / REGIONS_FOLDER
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


def _overlap(first: RegionRecord, second: RegionRecord) -> float:
    """Fraction of a region that another region of the same size covers."""
    width, height = first.grid[1] * first.step_lv0, first.grid[0] * first.step_lv0
    across, down = 1 - abs(first.x - second.x) / width, 1 - abs(first.y - second.y) / height
    return max(0.0, across) * max(0.0, down)
