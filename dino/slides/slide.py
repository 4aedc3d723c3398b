"""One slide, from its file to its tiles, its regions and its lines of the tables. Runs in a process of its own."""

import errno
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dino import randomness
from dino.errors import ConfigError, DinoError
from dino.slides import coordinates, parts, storage, tables
from dino.slides.lattice import Geometry
from dino.slides.reader import SlideReader
from dino.slides.slide_list import SlideRecord
from dino.slides.tables import RegionRecord, SlideStatus, TileRecord
from dino.slides.tissue import TissueRule, find_tissue, passes_qc, tissue_fractions

SAMPLED_TILES = 8


@dataclass(frozen=True)
class TilingPlan:
    """What is done with every slide.

    Attributes:
        geometry: The lattice.
        tissue: Which of its tiles and regions are kept.
        storage: ``jpeg``, ``tar`` or ``none`` (coordinates only).
        jpeg_quality: Quality of the tiles, 1 to 100.
        max_tiles_per_slide: Size of a random subset of each slide's tiles, 0 for all.
        seed: Seed of that subset.
        spacing_if_missing: µm per px of level 0 for slides whose metadata has none.
        previews: Whether pictures of tissue, tiles and regions are written.
    """

    geometry: Geometry = field(default_factory=Geometry)
    tissue: TissueRule = field(default_factory=TissueRule)
    storage: str = "jpeg"
    jpeg_quality: int = 90
    max_tiles_per_slide: int = 0
    seed: int = 0
    spacing_if_missing: float | None = None
    previews: bool = True

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        spacing = self.spacing_if_missing
        for name, value, good, rule in (
            ("storage", self.storage, self.storage in storage.STORAGES, f"one of {', '.join(storage.STORAGES)}"),
            ("jpeg_quality", self.jpeg_quality, 1 <= self.jpeg_quality <= 100, "a number from 1 to 100"),
            ("max_tiles_per_slide", self.max_tiles_per_slide, self.max_tiles_per_slide >= 0, "0 (all) or more"),
            ("spacing_at_level_0", spacing, spacing is None or spacing > 0, "a positive number of µm per px"),
        ):
            if not good:
                raise ConfigError(f"expected {name} to be {rule}, found {value}")


@dataclass(frozen=True)
class Survey:
    """Where a slide's tiles and regions lie.

    Attributes:
        tissue: hs2p's ``ResolvedTissueMask``.
        tiles: ``(N, 2)`` int64 level-0 ``(x, y)``, row-major.
        tile_tissue: ``(N,)`` float32 tissue fractions.
        regions: ``(M, 2)`` int64 level-0 ``(x, y)``, row-major.
        region_tissue: ``(M, n, n)`` float32 tissue fractions of the cells.
        remark: What the status should say although nothing is wrong.
    """

    tissue: Any
    tiles: np.ndarray
    tile_tissue: np.ndarray
    regions: np.ndarray
    region_tissue: np.ndarray
    remark: str


@dataclass(frozen=True)
class Measure:
    """What a dry run found on one slide; seconds are of one process."""

    status: SlideStatus
    seconds: float = 0.0
    sampled: int = 0
    sampled_bytes: int = 0
    sampled_seconds: float = 0.0


def tile_slide(record: SlideRecord, root: Path, plan: TilingPlan) -> SlideStatus:
    """Tile one slide and write all that belongs to it; its part is written last.

    Args:
        record: The slide.
        root: Output folder.
        plan: What is done.

    Returns:
        What became of it. A slide that cannot be tiled is reported, not raised.

    Raises:
        OSError: If ROOT's disk does not take what is written: that is not the slide's fault.
    """
    parts.drop_part(root, record.slide_id)
    made_from = origin_of(record)
    try:
        with _open(record, plan) as reader:
            survey = survey_slide(reader, record, plan)
            _write_tiles(reader, record, root, plan, survey)
            status = _status(record, reader, survey)
            expect_root(root)
            parts.save_part(root, status, made_from, _tiles(reader, record, survey), _regions(reader, record, survey))
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # slides' own errors are no system's
            raise
        status = failed(record, error)
        expect_root(root)
        parts.save_status(root, status, made_from)
    return status


def expect_root(root: Path) -> None:
    """Raise an OSError if ROOT has vanished, as when a mount is lost: under its mount point nothing is made anew."""
    if not (root / tables.TILING_FILE).exists():
        raise FileNotFoundError(errno.ENOENT, "the folder has vanished", str(root))


def measure_slide(record: SlideRecord, plan: TilingPlan) -> Measure:
    """Find a slide's tiles and regions and cut a few of the tiles, without writing anything.

    Args:
        record: The slide.
        plan: What would be done.
    """
    start = time.perf_counter()
    try:
        with _open(record, plan) as reader:
            survey = survey_slide(reader, record, plan)
            surveyed = time.perf_counter()
            sampled = survey.tiles[:: max(1, len(survey.tiles) // SAMPLED_TILES)]
            sizes = [len(storage.encode(reader.read_cell(x, y), plan.jpeg_quality)) for x, y in sampled]
            seconds = time.perf_counter() - surveyed
            return Measure(_status(record, reader, survey), surveyed - start, len(sizes), sum(sizes), seconds)
    except Exception as error:
        return Measure(failed(record, error))


def survey_slide(reader: SlideReader, record: SlideRecord, plan: TilingPlan) -> Survey:
    """Find tissue, and the tiles and regions that hold enough of it.

    Raises:
        DataError: If the mask does not fit or the slide cannot be read.
    """
    tissue = find_tissue(reader, record.mask_path, plan.tissue)
    tiles = reader.lattice.tile_origins()  # (N, 2)
    fractions = tissue_fractions(tissue.tissue_mask, tiles, reader)  # (N,)
    kept = np.flatnonzero(fractions >= plan.tissue.min_tissue)
    if plan.tissue.qc:
        kept = kept[passes_qc(reader, tiles[kept], plan.tissue)]
    if 0 < plan.max_tiles_per_slide < len(kept):
        rng = randomness.generator(plan.seed, 0, f"tiles of {record.slide_id}")
        kept = np.sort(rng.choice(kept, plan.max_tiles_per_slide, replace=False))
    regions, cells = _find_regions(reader, tissue.tissue_mask, plan.tissue.min_tissue_region)
    remark = "; ".join(_remarks(reader, plan, len(kept), len(regions)))
    return Survey(tissue, tiles[kept], fractions[kept], regions, cells, remark)


def origin_of(record: SlideRecord) -> dict[str, Any]:
    """What a slide's tiles depend on beside the settings; a slide that only moved keeps it."""
    return {
        "image_bytes": _size(record.image_path),
        "mask_bytes": _size(record.mask_path) if record.mask_path else None,
        "spacing_at_level_0": record.spacing_at_level_0,
    }


def about(record: SlideRecord) -> dict[str, Any]:
    """The columns of a slide's status that come from the slide list alone."""
    names = ("image_path", "mask_path", "patient_id", "partition", "centre", "scanner", "stain")
    return {name: getattr(record, name) for name in names}


def failed(record: SlideRecord, error: BaseException | str) -> SlideStatus:
    """Status of a slide that could not be tiled."""
    known = isinstance(error, (DinoError, str))
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    return SlideStatus(record.slide_id, tables.FAILED, " ".join(reason.split()), **about(record))


def _find_regions(reader: SlideReader, mask: np.ndarray, min_tissue: float) -> tuple[np.ndarray, np.ndarray]:
    """Origins ``(M, 2)`` of the regions with enough tissue, and their cells' fractions ``(M, n, n)``."""
    lattice, n = reader.lattice, reader.lattice.geometry.region_cells
    firsts = lattice.region_cells()  # (M, 2) column, row
    if not len(firsts):
        return firsts, np.zeros((0, n, n), np.float32)
    fractions = tissue_fractions(mask, lattice.cell_origins(), reader).reshape(lattice.rows, lattice.columns)
    cells = np.stack([fractions[row : row + n, column : column + n] for column, row in firsts])  # (M, n, n)
    kept = cells.mean(axis=(1, 2)) >= min_tissue
    return firsts[kept] * lattice.step_lv0, cells[kept]


def _remarks(reader: SlideReader, plan: TilingPlan, tiles: int, regions: int) -> list[str]:
    lattice, geometry = reader.lattice, plan.geometry
    if not len(lattice.tile_origins()):
        return [f"the slide ({lattice.slide_size[0]} x {lattice.slide_size[1]} px) is smaller than one tile"]
    remarks = (
        [] if tiles else [f"no tile holds {plan.tissue.min_tissue:.0%} tissue" + " and passes QC" * plan.tissue.qc]
    )
    if not len(lattice.region_cells()):
        remarks.append(
            f"no region of {geometry.region_cells} x {geometry.region_cells} cells fits into the slide's "
            f"{lattice.columns} x {lattice.rows}"
        )
    elif not regions:
        remarks.append(f"no region holds {plan.tissue.min_tissue_region:.0%} tissue")
    return remarks


def _write_tiles(reader: SlideReader, record: SlideRecord, root: Path, plan: TilingPlan, survey: Survey) -> None:
    result = coordinates.tiling_result(
        reader, record.slide_id, plan.tissue, survey.tissue, survey.tiles, survey.tile_tissue
    )
    coordinates.save_result(root, result)
    if plan.previews:
        coordinates.save_previews(
            root, record.slide_id, reader, survey.tissue.tissue_mask, survey.tiles, survey.regions
        )
    if plan.storage == "jpeg":
        places = [(int(x), int(y)) for x, y in survey.tiles]
        storage.write_jpegs(root, record.slide_id, places, reader.read_cell, plan.jpeg_quality)
    elif plan.storage == "tar" and len(survey.tiles):
        storage.write_tar(root, result, plan.jpeg_quality)


def _status(record: SlideRecord, reader: SlideReader, survey: Survey) -> SlideStatus:
    word = tables.OK if len(survey.tiles) or len(survey.regions) else tables.NO_TISSUE
    return SlideStatus(
        record.slide_id,
        word,
        survey.remark,
        tiles=len(survey.tiles),
        regions=len(survey.regions),
        spacing_um=reader.spacing_um,
        spacing_source=reader.spacing_source,
        width=reader.lattice.slide_size[0],
        height=reader.lattice.slide_size[1],
        **about(record),
    )


def _tiles(reader: SlideReader, record: SlideRecord, survey: Survey) -> list[TileRecord]:
    lattice = reader.lattice
    spacings = lattice.geometry.spacing_um, lattice.spacing_um
    return [
        TileRecord(record.slide_id, int(x), int(y), lattice.step_lv0, *spacings, float(fraction))
        for (x, y), fraction in zip(survey.tiles, survey.tile_tissue, strict=True)
    ]


def _regions(reader: SlideReader, record: SlideRecord, survey: Survey) -> list[RegionRecord]:
    lattice, n = reader.lattice, reader.lattice.geometry.region_cells
    places = [(int(x), int(y)) for x, y in survey.regions]
    return [
        RegionRecord(
            record.slide_id,
            x,
            y,
            lattice.step_lv0,
            (n, n),
            lattice.spacing_um,
            tables.region_path(record.slide_id, x, y),
            cells,
        )
        for (x, y), cells in zip(places, survey.region_tissue, strict=True)
    ]


def _open(record: SlideRecord, plan: TilingPlan) -> SlideReader:
    return SlideReader(record.image_path, plan.geometry, record.spacing_at_level_0, plan.spacing_if_missing)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
