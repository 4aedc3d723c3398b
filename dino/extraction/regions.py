"""Level 1: feature grids from tiles. Every cell is embedded once; every region is written to one ``.pt`` file."""

from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino import progress
from dino.errors import ConfigError, DataError
from dino.extraction.embed import Normalise, batches, normaliser_of, read_ahead
from dino.extraction.extractor import Extractor, ExtractSummary
from dino.extraction.pixels import (
    REGIONS,
    SLIDES,
    TILES,
    RegionImage,
    cells_of_slide,
    cells_of_tiles,
    list_region_images,
    match_region_images,
    read_region_image,
)
from dino.extraction.record import RECORD, check_folder, model_record, prepare_folders, write_record
from dino.files import atomic_path, oserror_to_data_error, write_text
from dino.slides.lattice import Geometry, cells_of_region
from dino.slides.reader import BACKEND, RESAMPLER
from dino.slides.slide_list import read_slide_list
from dino.slides.tables import (
    REGION_COLUMNS,
    REGIONS_FOLDER,
    REGIONS_TABLE,
    STATUS_TABLE,
    TILING_FILE,
    RegionRecord,
    SlideStatus,
    csv_line,
    read_regions,
    read_status,
    read_tiling,
    region_lines,
)

SOURCES = ("auto", SLIDES, TILES, REGIONS)
DEFAULT_TILE_PX = 256

Embedder = Callable[[Iterable[Tensor]], Generator[Tensor, None, None]]


@dataclass(frozen=True)
class ReadPlan:
    """The units to read from one slide, and the cells of each region among them.

    Attributes:
        units: Units in reading order: cells ``(x, y)``, or images of regions.
        rows: For each region, ``(h * w,)`` indices of its cells among all cells read, row-major.
        cells: Number of cells in all units.
    """

    units: Sequence[Any]
    rows: Sequence[Tensor]
    cells: int


def plan_cells(records: Sequence[RegionRecord]) -> ReadPlan:
    """Plan to read cells: a cell that is part of several regions is read and embedded once."""
    index: dict[tuple[int, int], int] = {}
    rows = []
    for r in records:
        cells = [(int(x), int(y)) for x, y in cells_of_region(r.x, r.y, r.step_lv0, r.grid)]
        rows.append(torch.tensor([index.setdefault(cell, len(index)) for cell in cells]))
    return ReadPlan(list(index), rows, len(index))


def plan_images(images: Sequence[RegionImage]) -> ReadPlan:
    """Plan to read images of regions."""
    rows, start = [], 0
    for image in images:
        count = image.record.grid[0] * image.record.grid[1]
        rows.append(torch.arange(start, start + count))
        start += count
    return ReadPlan(list(images), rows, start)


@dataclass(frozen=True)
class PixelSource:
    """The source of the pixels of an extraction.

    Attributes:
        root: ROOT.
        tile_size_px: Size of a cell.
        geometry: How ROOT was tiled; None for a folder of region images.
        status: Status of its slides, by id.
        slide_paths: Current paths of slides that were moved, by id.
    """

    root: Path
    tile_size_px: int
    geometry: Geometry | None = None
    status: Mapping[str, SlideStatus] = field(default_factory=dict)
    slide_paths: Mapping[str, Path] = field(default_factory=dict)

    def slide_path(self, slide_id: str) -> Path | None:
        """The slide's file, None if it does not exist."""
        status = self.status.get(slide_id)
        path = self.slide_paths.get(slide_id, status.image_path if status else None)
        return path if path is not None and path.is_file() else None

    def is_written(self, record: RegionRecord, dim: int) -> bool:
        """Whether the features of a region exist."""
        return is_written(self.root / record.path, record.grid[0] * record.grid[1], dim)


@dataclass(frozen=True)
class SlideRegions:
    """The regions of one slide that have no features yet.

    Attributes:
        slide_id: The slide.
        pixels: ``slides``, ``tiles`` or ``regions``.
        records: The regions.
        images: Their images, if pixels are read from images of regions.
        done: Number of regions of the slide whose features exist.
    """

    slide_id: str
    pixels: str
    records: list[RegionRecord]
    images: list[RegionImage]
    done: int

    def plan(self) -> ReadPlan:
        """Plan the reading."""
        return plan_images(self.images) if self.pixels == REGIONS else plan_cells(self.records)

    def open(self, source: PixelSource, plan: ReadPlan) -> AbstractContextManager[Callable[[Any], Tensor]]:
        """Open the source: a context with a function that reads one unit of the plan as ``(n, 3, S, S)`` uint8.

        Raises:
            DataError: If the pixels cannot be read.
        """
        if self.pixels == REGIONS:
            return nullcontext(partial(read_region_image, size_px=source.tile_size_px))
        if self.pixels == TILES:
            return cells_of_tiles(source.root, self.slide_id, plan.units, source.tile_size_px)
        path, status = source.slide_path(self.slide_id), source.status.get(self.slide_id)
        if path is None or status is None or source.geometry is None:
            recorded = f" at {status.image_path}" if status else ""
            raise DataError(
                f"expected the slide's file{recorded}, found none; pass the current folder of the slides: slides=FOLDER"
            )
        return cells_of_slide(path, source.geometry, status, self.records[0].step_lv0)


def split_by_slide(
    source: PixelSource, records: Sequence[RegionRecord], images: Sequence[RegionImage] | None, pixels: str, dim: int
) -> list[SlideRegions]:
    """Group regions by slide, without those whose features exist.

    Args:
        source: The source of the pixels.
        records: All regions of ROOT.
        images: The images of the regions, in the same order, if pixels are read from images.
        pixels: ``auto`` (the slide if its file exists, else its tiles), ``slides``, ``tiles`` or ``regions``.
        dim: Dimension of the features.
    """
    by_slide: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        by_slide[record.slide_id].append(index)
    slides = []
    for slide_id, indices in by_slide.items():
        missing = [i for i in indices if not source.is_written(records[i], dim)]
        chosen = pixels
        if pixels == "auto":
            chosen = SLIDES if source.slide_path(slide_id) else TILES
        found = [images[i] for i in missing] if images else []
        slides.append(SlideRegions(slide_id, chosen, [records[i] for i in missing], found, len(indices) - len(missing)))
    return slides


def check_pixels(slides: Sequence[SlideRegions], before: Mapping[str, Any]) -> None:
    """Check that a slide is completed from the same source of pixels: JPEG tiles differ slightly from the slide.

    Raises:
        DataError: If the source of a slide has changed.
    """
    for slide in slides:
        recorded = before.get("pixels", {}).get(slide.slide_id, slide.pixels)
        if slide.done and slide.records and recorded != slide.pixels:
            raise DataError(
                f"expected to complete slide '{slide.slide_id}' from its {recorded} as before, found {slide.pixels}; "
                f"set source={recorded}, or delete its features to compute them again"
            )


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
) -> None:
    """Embed the cells of one slide's regions; write each region as soon as its last cell is embedded.

    Args:
        plan: Result of :func:`plan_cells` or :func:`plan_images`.
        paths: The ``.pt`` of each region.
        read: Reads one unit as ``(n, 3, S, S)`` uint8.
        embedder: Maps batches ``(B, 3, S, S)`` to features ``(B, D)``, one by one.
        reading: Batch size and threads.
        advance: Called with the number of cells embedded since the last call.

    Raises:
        DataError: If pixels cannot be read. The regions written so far are kept.
    """
    features, done, written = torch.empty(0), 0, 0
    # Closed explicitly, not by the garbage collector: no thread may read from a slide after it was closed.
    with closing(read_ahead(read, plan.units, reading.workers, reading.ahead)) as blocks:
        cells = (cell for block in blocks for cell in block)
        with closing(embedder(batches(cells, reading.batch_size))) as parts:
            for part in parts:
                if not done:
                    features = torch.empty(plan.cells, part.shape[1])  # (cells, D)
                features[done : done + len(part)] = part
                done += len(part)
                while written < len(paths) and int(plan.rows[written].max()) < done:
                    write_features(paths[written], features[plan.rows[written]])
                    written += 1
                advance(len(part))


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


class RegionExtractor(Extractor):
    """Writes ``ROOT/region_4096_pretraining/<slide>_<x>_<y>.pt`` with a level-1 model."""

    title = "embed tiles"
    plan: tuple[PixelSource, list[SlideRegions]]

    def prepare(self) -> tuple[PixelSource, list[SlideRegions]]:
        """See :class:`Extractor`."""
        source, records, slides = self._find()
        record = self._record(source, slides)
        before = check_folder(self.root / RECORD, record, self.root / REGIONS_FOLDER, ".pt")
        check_pixels(slides, before)
        if not self.config.dry_run:
            with oserror_to_data_error(self.root):  # here, so that every process receives the error
                prepare_folders({(self.root / region.path).parent for region in records}, self.root / RECORD)
                write_record(self.root / RECORD, record, before)
                if source.geometry is None:
                    text = csv_line(REGION_COLUMNS) + "".join(region_lines(records))
                    write_text(self.root / REGIONS_TABLE, text)
        return source, slides

    def slides(self) -> Sequence[SlideRegions]:
        """See :class:`Extractor`."""
        return self.plan[1]

    def size(self, slide: SlideRegions) -> int:
        """Number of cells, each counted once."""
        return slide.plan().cells

    def example(self) -> Tensor | None:
        """See :class:`Extractor`."""
        size = self.plan[0].tile_size_px
        cells = sum(self.size(slide) for slide in self.slides())
        return torch.zeros(min(self.config.batch_size, max(cells, 1)), 3, size, size, dtype=torch.uint8)

    def normalise(self) -> Normalise:
        """See :class:`Extractor`."""
        return normaliser_of(self.loaded)

    def process(self, slide: SlideRegions, advance: Callable[[int], None]) -> None:
        """See :class:`Extractor`."""
        plan, config = slide.plan(), self.config
        ahead = max(1, config.num_workers) if slide.pixels == REGIONS else 2 * config.batch_size
        with slide.open(self.plan[0], plan) as read:
            paths = [self.root / record.path for record in slide.records]
            reading = Reading(config.batch_size, config.num_workers, ahead)
            write_regions(plan, paths, read, self.embedder, reading, advance)

    def summary(self, slides: Sequence[SlideRegions], **fields: Any) -> ExtractSummary:
        """See :class:`Extractor`."""
        rows = sum(record.grid[0] * record.grid[1] for slide in slides for record in slide.records)
        return ExtractSummary(
            self.root / REGIONS_FOLDER,
            written=sum(len(slide.records) for slide in slides),
            skipped=sum(slide.done for slide in self.slides()),
            embedded=sum(self.size(slide) for slide in slides),
            pixels=dict(Counter(slide.pixels for slide in self.slides() if slide.records)),
            gigabytes=rows * self.embed_dim * 4 / 1e9,
            **fields,
        )

    def _find(self) -> tuple[PixelSource, list[RegionRecord], list[SlideRegions]]:
        root, pixels = self.root, self.config.source
        if pixels not in SOURCES:
            raise ConfigError(f"expected source {', '.join(SOURCES)}, found '{pixels}'")
        if (root / TILING_FILE).exists():
            source = self._tiled()
            records = read_regions(root)
            if not records:
                raise DataError(
                    f"expected regions in {root / REGIONS_TABLE}, found none; tile with a smaller region_size_px into "
                    "another ROOT"
                )
            images = match_region_images(root, records) if pixels == REGIONS else None
            return source, records, split_by_slide(source, records, images, pixels, self.embed_dim)
        if pixels not in ("auto", REGIONS):
            raise DataError(f"expected {root / TILING_FILE} for source={pixels}, found none; run `dino tile`")
        source = PixelSource(root, self.loaded.tile_size_px or DEFAULT_TILE_PX)
        images = list_region_images(root, source.tile_size_px, self.loaded.spacing_um)
        records = [image.record for image in images]
        return source, records, split_by_slide(source, records, images, REGIONS, self.embed_dim)

    def _tiled(self) -> PixelSource:
        """The source of a ROOT that ``dino tile`` wrote."""
        geometry, loaded = read_tiling(self.root).geometry, self.loaded
        trained = loaded.spacing_um
        if trained and abs(trained - geometry.spacing_um) > geometry.tolerance * trained:
            raise DataError(
                f"expected a ROOT tiled at the {trained:g} µm/px that {loaded.source} was trained at, found "
                f"{geometry.spacing_um:g} in {self.root}; tile the slides at spacing_um={trained:g} into another ROOT"
            )
        if loaded.tile_size_px and loaded.tile_size_px != geometry.tile_size_px:
            progress.warn(
                f"the model was trained on tiles of {loaded.tile_size_px} px, but the tiles of this ROOT have "
                f"{geometry.tile_size_px} px"
            )
        status = read_status(self.root) if (self.root / STATUS_TABLE).exists() else {}
        moved = read_slide_list([Path(self.config.slides)], progress.warn) if self.config.slides else []
        paths = {record.slide_id: record.image_path for record in moved}
        return PixelSource(self.root, geometry.tile_size_px, geometry, status, paths)

    def _record(self, source: PixelSource, slides: Sequence[SlideRegions]) -> dict[str, Any]:
        return {
            **model_record(self.loaded, self.config.precision),
            "geometry": asdict(source.geometry) if source.geometry else {"tile_size_px": source.tile_size_px},
            "source": self.config.source,
            "backend": BACKEND,
            "resampler": RESAMPLER,
            "pixels": {slide.slide_id: slide.pixels for slide in slides if slide.records},
        }
