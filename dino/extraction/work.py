"""The work of a level-1 extraction: for each slide, where its pixels come from and which of its files are missing."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dino.errors import DataError
from dino.extraction import tile_files
from dino.extraction.folders import grid_folder, grid_path, tile_folder
from dino.extraction.inputs import Inputs, PixelSource
from dino.extraction.pixels import (
    REGIONS,
    SLIDES,
    TILES,
    RegionImage,
    cells_of_slide,
    cells_of_tiles,
    read_region_image,
)
from dino.extraction.regions import ReadPlan, count_cells, is_written, plan_cells, plan_images
from dino.slides.tables import RegionRecord, SlideTiles


@dataclass(frozen=True)
class Outputs:
    """The files of an extraction.

    Attributes:
        root: ROOT.
        name: Name of the encoder, of the folder of the tiles.
        grid_name: Name of the encoder in the folder of the grids, None for the folder without one.
        layout: A row of the tile files.
        tiles: Whether tile files are written.
        regions: Whether grids are written.
        reuse: Whether grids that exist are of this model and its settings, so that features of tiles can be taken from
            them.
    """

    root: Path
    name: str
    grid_name: str | None
    layout: tile_files.Layout
    tiles: bool = True
    regions: bool = True
    reuse: bool = True

    @property
    def tile_folder(self) -> Path:
        """Folder of the tile files."""
        return tile_folder(self.root, self.name)

    @property
    def grid_folder(self) -> Path:
        """Folder of the grids."""
        return grid_folder(self.root, self.grid_name)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that are written to."""
        return (self.tile_folder,) * self.tiles + (self.grid_folder,) * self.regions

    def tile_path(self, slide_id: str) -> Path:
        """The tile file of a slide."""
        return self.tile_folder / f"{slide_id}.h5"

    def grid_path(self, record: RegionRecord) -> Path:
        """The grid of a region."""
        return grid_path(self.grid_folder, record)

    def has_tiles(self, tiles: SlideTiles) -> bool:
        """Whether the features of a slide's tiles exist."""
        return tile_files.is_written(self.tile_path(tiles.slide_id), tiles.coords, self.layout)

    def has_grid(self, record: RegionRecord) -> bool:
        """Whether the features of a region exist."""
        return is_written(self.grid_path(record), record.grid[0] * record.grid[1], self.layout.dim)


@dataclass(frozen=True, eq=False)
class SlideCells:
    """What is missing of one slide.

    Attributes:
        slide_id: The slide.
        pixels: ``slides``, ``tiles`` or ``regions``.
        records: The regions without features.
        images: Their images, if pixels are read from images of regions.
        done: The regions with features.
        tiles: The tiles, if their file is missing.
        skipped: Number of files that exist.
        cells: Number of cells to embed.
    """

    slide_id: str
    pixels: str
    records: list[RegionRecord]
    images: list[RegionImage]
    done: list[RegionRecord]
    tiles: SlideTiles | None
    skipped: int
    cells: int = 0

    @property
    def files(self) -> int:
        """Number of files to write."""
        return len(self.records) + (self.tiles is not None)

    def counted(self) -> "SlideCells":
        """Itself, with the number of cells."""
        coords = self.tiles.coords if self.tiles else None
        return replace(self, cells=count_cells(self.records, coords, self.done))

    def plan(self) -> ReadPlan:
        """Plan the reading."""
        if self.pixels == REGIONS:
            return plan_images(self.images)
        return plan_cells(self.records, self.tiles.coords if self.tiles else None, self.done)

    def open(self, source: PixelSource, plan: ReadPlan) -> AbstractContextManager[Callable[[Any], Tensor]]:
        """Open the source: a context with a function that reads one unit of the plan as ``(n, 3, S, S)`` uint8.

        Raises:
            DataError: If the pixels cannot be read.
        """
        if self.pixels == REGIONS:
            return nullcontext(partial(read_region_image, size_px=source.tile_size_px))
        if self.pixels == TILES:
            return cells_of_tiles(source.root, self.slide_id, plan.units, source.tile_size_px)
        assert source.slides is not None  # a folder of region images is read as REGIONS
        step_lv0 = self.tiles.step_lv0 if self.tiles else self.records[0].step_lv0
        return cells_of_slide(source.slides, self.slide_id, step_lv0)


def split_by_slide(inputs: Inputs, outputs: Outputs, before: Mapping[str, Any]) -> list[SlideCells]:
    """Divide the work by slide.

    Args:
        inputs: Tiles, regions and their pixels.
        outputs: The files to write.
        before: The earlier record of the grids.

    Raises:
        DataError: If a slide would be completed from another source of pixels: JPEG tiles differ from the slide.
    """
    records, tiles, pixels = inputs.records, inputs.tiles, inputs.pixels
    by_slide: dict[str, list[int]] = defaultdict(list, {slide: [] for slide in tiles if outputs.tiles})
    for index, record in enumerate(records):
        if outputs.regions or record.slide_id in by_slide:
            by_slide[record.slide_id].append(index)
    slides = []
    for slide_id, indices in by_slide.items():
        chosen = (SLIDES if inputs.source.slide_path(slide_id) else TILES) if pixels == "auto" else pixels
        recorded = before.get("pixels", {}).get(slide_id, chosen)
        written = {i for i in indices if outputs.has_grid(records[i])}
        missing = [i for i in indices if i not in written] if outputs.regions else []
        found = tiles.get(slide_id) if outputs.tiles else None
        absent = None if found is None or outputs.has_tiles(found) else found
        if written and missing and recorded != chosen:
            raise DataError(
                f"expected to complete slide '{slide_id}' from its {recorded} as before, found {chosen}; set "
                f"source={recorded}, or delete its features to compute them again"
            )
        done = [records[i] for i in indices if i in written] if outputs.reuse and recorded == chosen else []
        skipped = len(written) * outputs.regions + (found is not None and absent is None)
        slide_images = [inputs.images[i] for i in missing] if inputs.images else []
        work = SlideCells(slide_id, chosen, [records[i] for i in missing], slide_images, done, absent, skipped)
        slides.append(work.counted())
    return slides
