"""``extract``: a trained network over regions (level 1) or over feature grids (level 2)."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dino import distributed, progress
from dino.api.extracting_slides import extract_slides
from dino.config.schema import ExtractConfig
from dino.errors import ConfigError, DataError
from dino.extraction.embed import PRECISIONS, embed_batches, normaliser
from dino.extraction.pixels import REGIONS, list_region_images
from dino.extraction.record import check_folder, make_tidy_folders, model_record, write_record
from dino.extraction.regions import Embedder, Reading, write_regions
from dino.extraction.summary import ExtractSummary
from dino.extraction.together import agreed, merged, shares
from dino.extraction.work import Place, SlideJob, find_work, refuse_other_pixels, split_by_slide
from dino.files import oserror_to_data_error, write_text
from dino.lock import RunLock
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.slides.reader import BACKEND, RESAMPLER
from dino.slides.slide_list import read_slide_list
from dino.slides.tables import (
    REGION_COLUMNS,
    REGIONS_FOLDER,
    REGIONS_TABLE,
    STATUS_TABLE,
    TILING_FILE,
    csv_line,
    read_regions,
    read_status,
    read_tiling,
    region_lines,
)

RECORD = "extract.json"
LONGEST_WAIT_MINUTES = 7 * 24 * 60  # processes meet at the end only, and the last may be hours behind the first
DEFAULT_TILE_PX = 256


def extract(model: str, root: str | Path, config: ExtractConfig) -> ExtractSummary:
    """Turn pixels into feature grids, or feature grids into slide files.

    A level-1 model writes ``ROOT/region_4096_pretraining/<slide>_<x>_<y>.pt``, one float32 ``[npatch x D]`` per region,
    row-major. A level-2 model writes ``ROOT/slide_features/<slide>.h5``. What the same model has done before is
    skipped. Under ``torchrun`` the slides are shared out over the processes.

    Args:
        model: Run folder, checkpoint, export, foreign checkpoint, or ``timm:NAME``.
        root: ROOT that ``dino tile`` wrote; or a folder of region images (level 1) or ``.pt`` grids (level 2).
        config: Settings.

    Returns:
        What was done. A slide that cannot be read is among its failures, and does not stop the others.

    Raises:
        DataError: If ROOT does not hold what the model needs, holds features that were made otherwise, or its disk does
            not take what is written.
        CheckpointError: If the model cannot be loaded.
        ConfigError: If a setting is wrong, or another extraction of this level is at work in ROOT.
    """
    if config.precision not in PRECISIONS or config.batch_size < 1 or config.num_workers < 0:
        raise ConfigError(
            f"expected precision {', '.join(PRECISIONS)}, batch_size of 1 or more and num_workers of 0 or more, found "
            f"{config.precision}, {config.batch_size} and {config.num_workers}"
        )
    root, device = Path(root), distributed.choose_device(config.device)
    distributed.check_precision(config.precision, device)
    if not root.is_dir():
        raise DataError(f"expected a folder at {root}, found {'a file' if root.exists() else 'nothing'}")
    with distributed.process_group(device, LONGEST_WAIT_MINUTES):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        loaded = load_backbone_file(model, config.arch, config.transform, pretrained=config.pretrained)
        run = _extract_regions if loaded.level == "patch" else extract_slides
        with oserror_to_data_error(root), _alone(root, loaded.level, config.dry_run):
            summary = run(loaded, root, config, device)
    for line in summary.lines():
        progress.say(line)
    return summary


def _alone(root: Path, level: str, dry_run: bool) -> AbstractContextManager[None]:
    """Let one extraction of each level at a time write into ROOT; a dry run writes nothing."""
    return nullcontext() if dry_run else RunLock(root, name=f"extract_{level}.lock.json").held()


def _extract_regions(loaded: LoadedBackbone, root: Path, config: ExtractConfig, device: torch.device) -> ExtractSummary:
    embedder = _embedder(loaded, config, device)
    place, jobs = agreed(lambda: _prepare(loaded, root, config))
    sizes = [job.cells for job in jobs]
    if config.dry_run:
        hours = _hours(embedder, place.tile_size_px, sum(sizes), config)
        return _summary(root, jobs, loaded.backbone.embed_dim, hours=hours, dry_run=True)
    failures: dict[str, str] = {}
    mine = [i for i in shares(sizes, distributed.world_size())[distributed.rank()] if sizes[i]]
    with progress.bar("embed cells", sum(sizes[i] for i in mine)) as bar:
        for job in (jobs[i] for i in mine):
            bar.advance(0, job.slide_id)
            try:
                _extract_slide(job, place, embedder, config, bar.advance)
            except DataError as error:
                failures[job.slide_id] = str(error)
    return _summary(root, jobs, loaded.backbone.embed_dim, failures=merged(failures))


def _summary(root: Path, jobs: list[SlideJob], dim: int, **facts: Any) -> ExtractSummary:
    failed = facts.get("failures", {})
    good = [job for job in jobs if job.slide_id not in failed]
    rows = sum(record.grid[0] * record.grid[1] for job in good for record in job.records)
    return ExtractSummary(
        root / REGIONS_FOLDER,
        written=sum(len(job.records) for job in good),
        skipped=sum(job.done for job in jobs),
        embedded=sum(job.cells for job in good),
        pixels=dict(Counter(job.pixels for job in jobs if job.records)),
        gigabytes=rows * dim * 4 / 1e9,
        **facts,
    )


def _extract_slide(
    job: SlideJob, place: Place, embedder: Embedder, config: ExtractConfig, notice: Callable[[int], None]
) -> None:
    plan = job.plan()
    ahead = max(1, config.num_workers) if job.pixels == REGIONS else 2 * config.batch_size
    with job.open(place, plan) as read:
        paths = [place.root / record.path for record in job.records]
        write_regions(plan, paths, read, embedder, Reading(config.batch_size, config.num_workers, ahead), notice)


def _prepare(loaded: LoadedBackbone, root: Path, config: ExtractConfig) -> tuple[Place, list[SlideJob]]:
    """Find the work, refuse to mix, and write the record."""
    dim = loaded.backbone.embed_dim
    if (root / TILING_FILE).exists():
        place = _tiled(root, config)
        _check_geometry(loaded, place)
        records = read_regions(root)
        if not records:
            raise DataError(
                f"expected regions in {root / REGIONS_TABLE}, found none; tile with a smaller region_size_px"
            )
        jobs = find_work(place, records, config.source, dim)
    else:
        if config.source not in ("auto", REGIONS):
            raise DataError(f"expected {root / TILING_FILE} for source={config.source}, found none; run `dino tile`")
        place = Place(root, loaded.tile_size_px or DEFAULT_TILE_PX)
        images = list_region_images(root, place.tile_size_px, loaded.spacing_um)
        records = [image.record for image in images]
        jobs = split_by_slide(place, records, images, REGIONS, dim)
    record = _record(loaded, config, place, jobs)
    before = check_folder(root / RECORD, record, root / REGIONS_FOLDER, ".pt")
    refuse_other_pixels(jobs, before)
    if not config.dry_run:
        with oserror_to_data_error(root):  # here, so that every process hears of it
            folders = {(root / region.path).parent for region in records}
            make_tidy_folders(folders, root / RECORD)
            write_record(root / RECORD, record, before)
            if place.geometry is None:
                write_text(root / REGIONS_TABLE, csv_line(REGION_COLUMNS) + "".join(region_lines(records)))
    return place, jobs


def _tiled(root: Path, config: ExtractConfig) -> Place:
    geometry = read_tiling(root).geometry
    status = read_status(root) if (root / STATUS_TABLE).exists() else {}
    moved = read_slide_list([Path(config.slides)], progress.warn) if config.slides else []
    paths = {record.slide_id: record.image_path for record in moved}
    return Place(root, geometry.tile_size_px, geometry, status, paths)


def _check_geometry(loaded: LoadedBackbone, place: Place) -> None:
    geometry, trained = place.geometry, loaded.spacing_um
    if geometry is None:
        return
    if trained and abs(trained - geometry.spacing_um) > geometry.tolerance * trained:
        raise DataError(
            f"expected a ROOT tiled at the {trained:g} µm/px that {loaded.source} was trained at, found "
            f"{geometry.spacing_um:g} in {place.root}; tile the slides at spacing_um={trained:g} into another ROOT"
        )
    if loaded.tile_size_px and loaded.tile_size_px != geometry.tile_size_px:
        progress.warn(f"trained on tiles of {loaded.tile_size_px} px, embeds tiles of {geometry.tile_size_px} px")


def _record(loaded: LoadedBackbone, config: ExtractConfig, place: Place, jobs: list[SlideJob]) -> dict[str, Any]:
    geometry = asdict(place.geometry) if place.geometry else {"tile_size_px": place.tile_size_px}
    return {
        **model_record(loaded, config.precision),
        "geometry": geometry,
        "source": config.source,
        "backend": BACKEND,
        "resampler": RESAMPLER,
        "pixels": {job.slide_id: job.pixels for job in jobs if job.records},
    }


def _embedder(loaded: LoadedBackbone, config: ExtractConfig, device: torch.device) -> Embedder:
    transform = loaded.transform
    if transform is None:
        raise DataError(f"{loaded.source}: expected a level-1 model with a transform, found none; give transform=")
    size = transform.input_size_px
    patch_size = loaded.backbone.spec.patch_size
    normalise = normaliser(transform.mean, transform.std, patch_size, (size, size) if size else None)
    return lambda batches: embed_batches(loaded.backbone, batches, normalise, device, config.precision)


def _hours(embedder: Embedder, size_px: int, cells: int, config: ExtractConfig) -> float:
    """Computing time of so many cells, by the second of two batches."""
    batch = torch.zeros(min(config.batch_size, max(cells, 1)), 3, size_px, size_px, dtype=torch.uint8)
    started = 0.0
    for number, _ in enumerate(embedder([batch, batch])):
        started = time.monotonic() if number == 0 else time.monotonic() - started
    return started * cells / len(batch) / distributed.world_size() / 3600
