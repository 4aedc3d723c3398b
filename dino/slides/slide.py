"""Tiles one slide: from its file to tiles, regions and table rows. Runs in a separate process."""

import errno
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino import randomness
from dino.config.schema import TileConfig
from dino.errors import CacheError, ConfigError, DinoError
from dino.slides import parts, storage, tables
from dino.slides.annotations import Annotations, check_roi_settings, has_roi, read_annotations
from dino.slides.lattice import Geometry
from dino.slides.reader import BACKEND, READERS, SlideReader
from dino.slides.remote_cache import SlideCache
from dino.slides.slide_list import SlideRecord, inputs_of
from dino.slides.tables import RegionRecord, SlideStatus, TileRecord
from dino.slides.tissue import check_tissue_settings, find_tissue, passes_qc, tissue_fractions

SAMPLED_TILES = 8  # tiles of a slide that a dry run cuts


def check_settings(config: TileConfig) -> None:
    """Raise a ConfigError if a setting is out of range or does not fit another."""
    if config.num_workers < 1:
        raise ConfigError(f"expected num_workers to be at least 1, found {config.num_workers}")
    Geometry.of(config)
    check_tissue_settings(config)
    check_roi_settings(config)
    spacing = config.spacing_at_level_0
    for name, good, rule in (
        ("storage", config.storage in storage.STORAGES, f"one of {', '.join(storage.STORAGES)}"),
        ("reader", config.reader in READERS, f"one of {', '.join(READERS)}"),
        (
            "reader",
            config.storage != "tar" or config.reader == BACKEND,
            f"{BACKEND} with storage=tar, which hs2p writes",
        ),
        ("jpeg_quality", 1 <= config.jpeg_quality <= 100, "a number from 1 to 100"),
        ("max_tiles_per_slide", config.max_tiles_per_slide >= 0, "0 (all) or more"),
        ("spacing_at_level_0", spacing is None or spacing > 0, "a positive number of µm per px"),
    ):
        if not good:
            raise ConfigError(f"expected {name} to be {rule}, found {getattr(config, name)}")
    storage.check_extras(config.storage)


@dataclass(frozen=True)
class Survey:
    """Tissue, tiles and regions found on a slide.

    Attributes:
        tissue: hs2p's ``ResolvedTissueMask``.
        tiles: ``(N, 2)`` int64 level-0 ``(x, y)``, row-major.
        tile_tissue: ``(N,)`` float32 tissue fractions.
        regions: ``(M, 2)`` int64 level-0 ``(x, y)``, row-major.
        region_tissue: ``(M, n, n)`` float32 tissue fractions of their cells.
        remark: Explanation for the status of a slide without tiles or regions; otherwise empty.
        annotations: Its annotations, if it has any.
    """

    tissue: Any
    tiles: np.ndarray
    tile_tissue: np.ndarray
    regions: np.ndarray
    region_tissue: np.ndarray
    remark: str
    annotations: Annotations | None


@dataclass(frozen=True)
class Measurement:
    """Result of a dry run on one slide; times are in seconds of one process."""

    status: SlideStatus
    seconds: float = 0.0
    sampled: int = 0
    sampled_bytes: int = 0
    sampled_seconds: float = 0.0


def tile_slide(record: SlideRecord, root: Path, config: TileConfig) -> SlideStatus:
    """Tile one slide and write all its files; its part of the tables is written last.

    Args:
        record: The slide.
        root: Output folder.
        config: The settings.

    Returns:
        Its status. A slide that cannot be tiled is reported as failed, not raised.

    Raises:
        OSError: If writing to ROOT fails, which is not an error of the slide.
        CacheError: If there is no room for a slide of an object store.
    """
    parts.drop_part(root, record.slide_id)
    made_from = inputs_of(record)
    try:
        with _open(record, config) as reader:
            survey = survey_slide(reader, record, config)
            _write_tiles(reader, record, root, config, survey)
            status = _status(record, reader, survey)
            expect_root(root)
            parts.save_part(root, status, made_from, _tiles(reader, record, survey), _regions(reader, record, survey))
    except Exception as error:
        if isinstance(error, CacheError) or (isinstance(error, OSError) and error.errno is not None):
            raise  # errors of slides have no errno
        status = failed(record, error)
        expect_root(root)
        parts.save_status(root, status, made_from)
    return status


def expect_root(root: Path) -> None:
    """Raise an OSError if ROOT has disappeared, for example because a mount was lost; it must not be created again."""
    if not (root / tables.TILING_FILE).exists():
        raise FileNotFoundError(errno.ENOENT, "the folder has disappeared", str(root))


def measure_slide(record: SlideRecord, config: TileConfig) -> Measurement:
    """Find a slide's tiles and regions and cut a few of the tiles, without writing anything.

    Args:
        record: The slide.
        config: The settings.
    """
    start = time.perf_counter()
    try:
        with _open(record, config) as reader:
            survey = survey_slide(reader, record, config)
            surveyed = time.perf_counter()
            sampled = survey.tiles[:: max(1, len(survey.tiles) // SAMPLED_TILES)]
            sizes = [len(storage.encode(reader.read_cell(x, y), config.jpeg_quality)) for x, y in sampled]
            seconds = time.perf_counter() - surveyed
            return Measurement(_status(record, reader, survey), surveyed - start, len(sizes), sum(sizes), seconds)
    except Exception as error:
        return Measurement(failed(record, error))


def survey_slide(reader: SlideReader, record: SlideRecord, config: TileConfig) -> Survey:
    """Find tissue, and the tiles and regions that contain enough of it and lie in the region of interest.

    Raises:
        DataError: If the mask or the annotations do not fit, or the slide cannot be read.
    """
    cache, annotations = slide_cache(config), None
    if record.annotation_path:
        with cache.local_path(record.annotation_path, check=True) as path:
            annotations = read_annotations(path, reader.lattice.slide_size, reader.spacing_um)
    with ExitStack() as leases:
        mask = record.mask_path and leases.enter_context(cache.local_path(record.mask_path, check=True))
        tissue = find_tissue(reader, mask, config)
    tiles = reader.lattice.tile_origins()  # (N, 2)
    fractions = tissue_fractions(tissue.tissue_mask, tiles, reader)  # (N,)
    kept = np.flatnonzero(fractions >= config.min_tissue)
    kept = kept[_in_roi(annotations, tiles[kept], reader.lattice.step_lv0, config)]
    if config.qc:
        kept = kept[passes_qc(reader, tiles[kept], config)]
    if 0 < config.max_tiles_per_slide < len(kept):
        rng = randomness.generator(config.seed, 0, f"tiles of {record.slide_id}")
        kept = np.sort(rng.choice(kept, config.max_tiles_per_slide, replace=False))
    regions, cells = _find_regions(reader, tissue.tissue_mask, config.min_tissue_region)
    inside = _in_roi(annotations, regions, reader.lattice.step_lv0 * reader.lattice.geometry.region_cells, config)
    regions, cells = regions[inside], cells[inside]
    remark = "; ".join(_remarks(reader, config, len(kept), len(regions), annotations))
    return Survey(tissue, tiles[kept], fractions[kept], regions, cells, remark, annotations)


def slide_cache(config: TileConfig) -> SlideCache:
    """Where slides of object stores are kept."""
    return SlideCache(config.slide_cache, config.slide_cache_gb)


def columns_of(record: SlideRecord) -> dict[str, Any]:
    """The columns of a slide's status that come from the slide list."""
    names = ("image_path", "mask_path", "patient_id", "partition", "centre", "scanner", "stain", "further")
    return {name: getattr(record, name) for name in names}


def failed(record: SlideRecord, error: BaseException | str) -> SlideStatus:
    """Status of a slide that could not be tiled."""
    is_message = isinstance(error, (DinoError, str))
    reason = str(error) if is_message else f"{type(error).__name__}: {error}"
    return SlideStatus(record.slide_id, tables.FAILED, " ".join(reason.split()), **columns_of(record))


def _find_regions(reader: SlideReader, mask: np.ndarray, min_tissue: float) -> tuple[np.ndarray, np.ndarray]:
    """Origins ``(M, 2)`` of the regions with enough tissue, and their cells' fractions ``(M, n, n)``."""
    lattice, n = reader.lattice, reader.lattice.geometry.region_cells
    corners = lattice.region_cells()  # (M, 2) column, row
    if not len(corners):
        return corners, np.zeros((0, n, n), np.float32)
    fractions = tissue_fractions(mask, lattice.cell_origins(), reader).reshape(lattice.rows, lattice.columns)
    cells = np.stack([fractions[row : row + n, column : column + n] for column, row in corners])  # (M, n, n)
    kept = cells.mean(axis=(1, 2)) >= min_tissue
    return corners[kept] * lattice.step_lv0, cells[kept]


def _in_roi(annotations: Annotations | None, origins: np.ndarray, side: int, config: TileConfig) -> np.ndarray:
    """Whether each square is a region of interest, ``(N,)`` bool."""
    if annotations is None or not has_roi(config):
        return np.full(len(origins), not config.roi_include)
    return annotations.inside(origins, side, config) >= config.min_roi


def _remarks(
    reader: SlideReader, config: TileConfig, tiles: int, regions: int, annotations: Annotations | None
) -> list[str]:
    lattice, geometry = reader.lattice, reader.lattice.geometry
    if not len(lattice.tile_origins()):
        return [f"the slide ({lattice.slide_size[0]} x {lattice.slide_size[1]} px) is smaller than one tile"]
    remarks = [] if tiles else [f"no tile has at least {config.min_tissue:.0%} tissue" + " and passes QC" * config.qc]
    if not tiles and has_roi(config):
        classes = ", ".join(annotations.areas) if annotations else ""
        remarks[0] += (
            f" and lies at least {config.min_roi:.0%} in the region of interest (classes: {classes or 'none'})"
        )
    if not len(lattice.region_cells()):
        remarks.append(
            f"no region of {geometry.region_cells} x {geometry.region_cells} cells fits into the "
            f"{lattice.columns} x {lattice.rows} cells of the slide; a smaller region_size_px (now "
            f"{config.region_size_px}) and another ROOT give regions"
        )
    elif not regions:
        remarks.append(
            f"no region has at least {config.min_tissue_region:.0%} tissue"
            + f" and lies at least {config.min_roi:.0%} in the region of interest" * has_roi(config)
        )
    if annotations and annotations.ignored:
        remarks.append(f"{annotations.ignored} objects without area are ignored in the annotations")
    return remarks


def _write_tiles(reader: SlideReader, record: SlideRecord, root: Path, config: TileConfig, survey: Survey) -> None:
    result = storage.tiling_result(reader, record.slide_id, config, survey.tissue, survey.tiles, survey.tile_tissue)
    storage.save_result(root, result, record.image_path, record.mask_path)
    if config.previews:
        storage.save_previews(root, record.slide_id, reader, survey.tissue.tissue_mask, survey.tiles, survey.regions)
        outlines = survey.annotations.outlines if survey.annotations else []
        storage.save_annotation_preview(root, record.slide_id, reader, outlines)
    if config.storage in ("jpeg", "parquet"):
        positions = [(int(x), int(y)) for x, y in survey.tiles]
        write = storage.write_jpegs if config.storage == "jpeg" else storage.write_parquet
        write(root, record.slide_id, positions, reader.read_cell, config.jpeg_quality)
    elif config.storage == "tar":
        storage.write_tar(root, result, config.jpeg_quality)


def _status(record: SlideRecord, reader: SlideReader, survey: Survey) -> SlideStatus:
    status = tables.OK if len(survey.tiles) or len(survey.regions) else tables.NO_TISSUE
    return SlideStatus(
        record.slide_id,
        status,
        survey.remark,
        tiles=len(survey.tiles),
        regions=len(survey.regions),
        spacing_um=reader.spacing_um,
        spacing_source=reader.spacing_source,
        width=reader.lattice.slide_size[0],
        height=reader.lattice.slide_size[1],
        **columns_of(record),
    )


def _tiles(reader: SlideReader, record: SlideRecord, survey: Survey) -> list[TileRecord]:
    lattice = reader.lattice
    spacings = lattice.geometry.spacing_um, lattice.spacing_um
    classes, shares = [""] * len(survey.tiles), np.zeros(len(survey.tiles))
    if survey.annotations:
        classes, shares = survey.annotations.classes(survey.tiles, lattice.step_lv0)
    return [
        TileRecord(record.slide_id, int(x), int(y), lattice.step_lv0, *spacings, float(fraction), name, float(share))
        for (x, y), fraction, name, share in zip(survey.tiles, survey.tile_tissue, classes, shares, strict=True)
    ]


def _regions(reader: SlideReader, record: SlideRecord, survey: Survey) -> list[RegionRecord]:
    lattice, n = reader.lattice, reader.lattice.geometry.region_cells
    positions = [(int(x), int(y)) for x, y in survey.regions]
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
        for (x, y), cells in zip(positions, survey.region_tissue, strict=True)
    ]


def _open(record: SlideRecord, config: TileConfig) -> SlideReader:
    spacings = record.spacing_at_level_0, config.spacing_at_level_0
    cache = slide_cache(config)
    return SlideReader(record.image_path, Geometry.of(config), *spacings, reader=config.reader, cache=cache, check=True)
