"""The second half of ``extract``: a level-2 network over feature grids, one HDF5 file per slide."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino import distributed, files, progress
from dino.config.schema import ExtractConfig
from dino.data.grids import read_grid
from dino.errors import DataError
from dino.extraction.embed import embed, grids_as_they_are
from dino.extraction.record import check_folder, make_tidy_folders, model_record, read_record, write_record
from dino.extraction.slide_files import (
    FOLDER,
    GridFile,
    SlideGrids,
    check_dim,
    is_written,
    slides_of_folder,
    slides_of_tables,
    write_slide,
)
from dino.extraction.stream import batches, read_ahead
from dino.extraction.summary import ExtractSummary
from dino.extraction.together import agreed, merged, shares
from dino.models.weights import LoadedBackbone
from dino.slides.tables import (
    REGIONS_FOLDER,
    REGIONS_TABLE,
    STATUS_TABLE,
    TILING_FILE,
    read_regions,
    read_status,
    read_tiling,
)

RECORD = "extract.json"


def extract_slides(loaded: LoadedBackbone, root: Path, config: ExtractConfig, device: torch.device) -> ExtractSummary:
    """Embed the grids of every slide, and write ``ROOT/slide_features/<slide>.h5``.

    Args:
        loaded: A level-2 model.
        root: ROOT with ``region_4096_pretraining/``, or a folder of ``.pt`` grids.
        config: Settings.
        device: Where to compute.

    Returns:
        What was done.

    Raises:
        DataError: If there are no grids, or the folder holds slide files that were made otherwise.
    """
    folder, dim = root / FOLDER, loaded.backbone.embed_dim
    slides = agreed(partial(_prepare, loaded, root, config))
    done = agreed(lambda: {s.slide_id for s in slides if is_written(folder / f"{s.slide_id}.h5", s, dim)})
    to_do = [s for s in slides if s.slide_id not in done]
    sizes = [len(s.grids) for s in to_do]
    read = partial(_read, order=config.grid_order)
    run = partial(embed, loaded.backbone, normalise=grids_as_they_are, device=device, precision=config.precision)
    if config.dry_run:
        hours = _hours(to_do, run, read) / distributed.world_size()
        return _summary(folder, to_do, len(done), dim, hours=hours, dry_run=True)
    model = {"model": loaded.source, "encoder": loaded.backbone.spec.arch, "fingerprint": loaded.fingerprint}
    failures: dict[str, str] = {}
    mine = [to_do[i] for i in shares(sizes, distributed.world_size())[distributed.rank()]]
    with progress.bar("embed regions", sum(len(s.grids) for s in mine)) as bar:
        for slide in mine:
            try:
                check_dim(slide.grids, loaded.backbone.spec.input_dim)
                grids = read_ahead(read, slide.grids, config.num_workers, config.batch_size)
                features = run(batches=batches(grids, config.batch_size))  # (R, D)
                write_slide(folder / f"{slide.slide_id}.h5", slide, features, model)
            except DataError as error:
                failures[slide.slide_id] = str(error)
            bar.advance(len(slide.grids), slide.slide_id)
    return _summary(folder, to_do, len(done), dim, failures=merged(failures))


def _prepare(loaded: LoadedBackbone, root: Path, config: ExtractConfig) -> list[SlideGrids]:
    """Find the slides, refuse to mix, and write the record."""
    level_1 = read_record(root / RECORD)
    slides, geometry = _find(root)
    first = next((g for s in slides for g in s.grids if g.path.is_file()), None)
    if first is not None:  # a whole folder of another width is one error, not one per slide
        check_dim([first], loaded.backbone.spec.input_dim)
    if level_1.get("embed_dim", loaded.backbone.spec.input_dim) != loaded.backbone.spec.input_dim:
        raise DataError(
            f"expected grids of D={loaded.backbone.spec.input_dim}, which {loaded.source} was trained on, found "
            f"D={level_1['embed_dim']} by {level_1.get('model')} in {root}; extract with its level-1 model"
        )
    grids = {key: level_1.get(key) for key in ("fingerprint", "transform", "precision")} if level_1 else None
    record = {
        **model_record(loaded, config.precision),
        "geometry": geometry,
        "grids": grids,
        "grid_order": config.grid_order,
    }
    folder = root / FOLDER
    before = check_folder(folder / RECORD, record, folder, ".h5")
    if not config.dry_run:
        with files.oserror_to_data_error(root):  # here, so that every process hears of it
            make_tidy_folders([folder], folder / RECORD)
            write_record(folder / RECORD, record, before)
    return slides


def _find(root: Path) -> tuple[list[SlideGrids], dict[str, Any] | None]:
    if not (root / REGIONS_TABLE).exists():
        folder = root / REGIONS_FOLDER if (root / REGIONS_FOLDER).is_dir() else root
        progress.say(f"{folder}: no {REGIONS_TABLE}; grids are taken as square, rows as row-major (see grid_order)")
        return slides_of_folder(folder), None
    records = read_regions(root)
    if not records:
        raise DataError(f"expected regions in {root / REGIONS_TABLE}, found none; tile with a smaller region_size_px")
    status = read_status(root) if (root / STATUS_TABLE).exists() else {}
    if (root / TILING_FILE).exists():
        geometry = read_tiling(root).geometry
        tile_size, spacing = geometry.tile_size_px, geometry.spacing_um
    else:  # region images: a cell's footprint was taken to be its size
        tile_size, spacing = records[0].step_lv0, records[0].spacing_um
    return slides_of_tables(root, records, status, tile_size, spacing), {
        "tile_size_px": tile_size,
        "spacing_um": spacing if math.isfinite(spacing) else None,
    }


def _read(grid: GridFile, order: str) -> Tensor:
    return read_grid(grid.path, order, grid.shape, grid.region)


def _hours(slides: list[SlideGrids], run: Callable[..., Tensor], read: Callable[[GridFile], Tensor]) -> float:
    """Time for all regions by the time that the first one takes."""
    if not slides:
        return 0.0
    batch = read(slides[0].grids[0])[None]
    started = time.monotonic()
    run(batches=[batch])
    return (time.monotonic() - started) * sum(len(s.grids) for s in slides) / 3600


def _summary(folder: Path, slides: list[SlideGrids], skipped: int, dim: int, **facts: Any) -> ExtractSummary:
    good = [s for s in slides if s.slide_id not in facts.get("failures", {})]
    regions = sum(len(s.grids) for s in good)
    size = (regions + len(good)) * dim * 4 / 1e9
    return ExtractSummary(folder, len(good), skipped, embedded=regions, gigabytes=size, **facts)
