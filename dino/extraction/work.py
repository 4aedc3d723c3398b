"""What is still to be done of a level-1 extraction, slide by slide."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dino.errors import ConfigError, DataError
from dino.extraction.pixels import (
    REGIONS,
    SLIDES,
    TILES,
    RegionImage,
    cells_of_slide,
    cells_of_tiles,
    match_region_images,
    read_region_image,
)
from dino.extraction.regions import Plan, is_written, plan_cells, plan_images
from dino.slides.lattice import Geometry
from dino.slides.tables import RegionRecord, SlideStatus

SOURCES = ("auto", SLIDES, TILES, REGIONS)


@dataclass(frozen=True)
class Place:
    """Where an extraction reads.

    Attributes:
        root: ROOT.
        tile_size_px: Side of a cell.
        geometry: How ROOT was tiled; None for a folder of region images.
        status: Its slides.
        slide_paths: Where slides lie now, for those that moved.
    """

    root: Path
    tile_size_px: int
    geometry: Geometry | None = None
    status: Mapping[str, SlideStatus] = field(default_factory=dict)
    slide_paths: Mapping[str, Path] = field(default_factory=dict)

    def slide_path(self, slide_id: str) -> Path | None:
        """The slide's file, None if it is not there."""
        status = self.status.get(slide_id)
        path = self.slide_paths.get(slide_id, status.image_path if status else None)
        return path if path is not None and path.is_file() else None


@dataclass(frozen=True)
class SlideJob:
    """The regions of one slide that are still to do.

    Attributes:
        slide_id: The slide.
        pixels: ``slides``, ``tiles`` or ``regions``.
        records: The regions to do.
        images: Their images, where pixels come from those.
        done: How many regions of the slide were done before.
    """

    slide_id: str
    pixels: str
    records: list[RegionRecord]
    images: list[RegionImage]
    done: int

    @property
    def cells(self) -> int:
        """Cells to embed, each counted once."""
        return self.plan().cells

    def plan(self) -> Plan:
        """What to read."""
        return plan_images(self.images) if self.pixels == REGIONS else plan_cells(self.records)

    def open(self, place: Place, plan: Plan) -> AbstractContextManager[Callable[[Any], Tensor]]:
        """Open the source of the pixels: a context whose value reads one unit of the plan.

        Raises:
            DataError: If it cannot be read.
        """
        if self.pixels == REGIONS:
            return nullcontext(partial(read_region_image, size_px=place.tile_size_px))
        if self.pixels == TILES:
            return cells_of_tiles(place.root, self.slide_id, plan.units, place.tile_size_px)
        path, status = place.slide_path(self.slide_id), place.status.get(self.slide_id)
        if path is None or status is None or place.geometry is None:
            known = f" at {status.image_path}" if status else ""
            raise DataError(
                f"expected the slide's file{known}, found none; say where slides are now with slides=FOLDER"
            )
        return cells_of_slide(path, place.geometry, status, self.records[0].step_lv0)


def find_work(place: Place, records: Sequence[RegionRecord], source: str, dim: int) -> list[SlideJob]:
    """Every slide with its regions that are not done, and where their pixels will come from.

    With ``auto`` that is the slide where its file is there, else its cut tiles.

    Args:
        place: Where to read.
        records: All regions of ROOT.
        source: ``auto``, ``slides``, ``tiles`` or ``regions``.
        dim: Width of the features.

    Raises:
        ConfigError: If the source is unknown.
        DataError: If region images are asked for and some are not there.
    """
    if source not in SOURCES:
        raise ConfigError(f"expected source {', '.join(SOURCES)}, found '{source}'")
    images = match_region_images(place.root, records) if source == REGIONS else None
    return split_by_slide(place, records, images, source, dim)


def split_by_slide(
    place: Place, records: Sequence[RegionRecord], images: Sequence[RegionImage] | None, source: str, dim: int
) -> list[SlideJob]:
    """Group regions by slide, those already done taken out (:func:`find_work`, with images known)."""
    by_slide: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        by_slide[record.slide_id].append(index)
    jobs = []
    for slide_id, indices in by_slide.items():
        to_do = [i for i in indices if not _done(place, records[i], dim)]
        pixels = source
        if source == "auto":
            pixels = SLIDES if place.slide_path(slide_id) else TILES
        found = [images[i] for i in to_do] if images else []
        jobs.append(SlideJob(slide_id, pixels, [records[i] for i in to_do], found, len(indices) - len(to_do)))
    return jobs


def refuse_other_pixels(jobs: Sequence[SlideJob], before: Mapping[str, Any]) -> None:
    """Refuse to finish a slide from pixels other than those it was begun with: JPEG tiles are not quite the slide.

    Raises:
        DataError: Naming the slide.
    """
    for job in jobs:
        begun = before.get("pixels", {}).get(job.slide_id, job.pixels)
        if job.done and job.records and begun != job.pixels:
            raise DataError(
                f"expected to finish slide '{job.slide_id}' from its {begun} as it was begun, found {job.pixels}; "
                f"give source={begun}, or delete its features to make them anew"
            )


def _done(place: Place, record: RegionRecord, dim: int) -> bool:
    return is_written(place.root / record.path, record.grid[0] * record.grid[1], dim)
