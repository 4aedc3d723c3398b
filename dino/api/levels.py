"""The two levels. A level is a backbone, a dataset and a crop module; everything else is shared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino import progress
from dino.api.grid_cache import grid_source
from dino.config.schema import PatchConfig, PretrainConfig, RegionConfig
from dino.crops.grids import GridCrops
from dino.crops.images import ImageCrops
from dino.data.grid_files import GridEntry
from dino.data.grid_folder import GridFolder
from dino.data.images import list_names
from dino.data.sources import ImageFolder, keep_partition, slide_of
from dino.data.tile_cache import tile_cache
from dino.errors import ConfigError, DataError
from dino.models.backbone import BackboneSpec
from dino.models.transforms import TRANSFORMS, Transform
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.slides.tables import OK, read_regions, read_status, read_tiling

TILES = Path("patch_256_pretraining", "imgs")
GRIDS = Path("region_4096_pretraining")


@dataclass(frozen=True)
class Level:
    """What distinguishes a run of one level from one of the other.

    Attributes:
        name: ``patch`` or ``region``.
        source: Its samples.
        crops: Draws and applies its views.
        spec: Its backbone.
        transform: Normalisation of its images; None for feature grids.
        geometry: Spacing and tile size of its samples, where known.
        slides: ``slide_ids`` and ``patient_ids`` that it trains on, as far as they are known.
        start: Start weights; None to start from nothing.
    """

    name: str
    source: ImageFolder | GridFolder
    crops: ImageCrops | GridCrops
    spec: BackboneSpec
    transform: Transform | None
    geometry: dict[str, Any]
    slides: dict[str, list[str]]
    start: LoadedBackbone | None


def build_level(config: PretrainConfig) -> Level:
    """Find the data of a run and build its source, crops and backbone spec.

    Args:
        config: A :class:`PatchConfig` or a :class:`RegionConfig`; it decides the level.

    Raises:
        DataError: If the folder is missing, empty, or holds what cannot be trained on.
        ConfigError: If sizes do not fit.
    """
    if not config.data_dir:
        raise ConfigError("expected a data folder, found none; name ROOT (data_dir=…)")
    if not Path(config.data_dir).is_dir():
        raise DataError(f"expected a data folder at {config.data_dir}, found nothing; check the path")
    return patch_level(config) if isinstance(config, PatchConfig) else region_level(config)  # type: ignore[arg-type]


def patch_level(config: PatchConfig) -> Level:
    """Level 1: tiles of a folder, or those that ``dino tile`` cut under a root."""
    root = Path(config.data_dir)
    folder = next((root / inner for inner in (TILES, "imgs") if (root / inner).is_dir()), root)
    names = keep_partition(list_names(folder), slide_of, _partitions(root))
    if not names:
        raise DataError(f"expected tiles with partition blank or pretrain under {folder}, found only held-out slides")
    source = ImageFolder(folder, names, tile_cache(len(names), config.speed.ram_cache))
    size, patch_size = config.aug.global_crops_size, config.model.patch_size
    for name in ("global_crops_size", "local_crops_size"):
        if getattr(config.aug, name) % patch_size:
            raise ConfigError(
                f"expected aug.{name} to be a multiple of model.patch_size={patch_size}, "
                f"found {getattr(config.aug, name)}"
            )
    start = _start(config)
    transform = TRANSFORMS["imagenet"] if start is None or start.transform is None else start.transform
    return Level(
        "patch",
        source,
        ImageCrops(config.aug, transform.mean, transform.std),
        BackboneSpec(config.model.arch, "patch", 3, (size, size), patch_size, config.model.pos_resample),
        transform,
        _geometry(root),
        _slides(root, source.slide_ids),
        start,
    )


def region_level(config: RegionConfig) -> Level:
    """Level 2: feature grids of a folder, or those that ``dino extract`` wrote under a root."""
    root = Path(config.data_dir)
    folder = root / GRIDS if (root / GRIDS).is_dir() else root
    source, cells = grid_source(folder, grid_entries(root, folder), config)
    crops = GridCrops((source.height, source.width), config.aug, cells)
    model = config.model
    height, width = crops.sizes[0]
    return Level(
        "region",
        source,
        crops,
        BackboneSpec(model.arch, "region", source.dim, (height, width), 1, model.pos_resample),
        None,
        {**_geometry(root), "region_cells": [source.height, source.width]},
        _slides(root, source.slide_ids),
        _start(config),
    )


def grid_entries(root: Path, folder: Path) -> list[GridEntry]:
    """Grid files of ``folder`` in order, with slide, shape and tissue from ``root/regions.csv`` where it lists them.

    Raises:
        DataError: If there is no ``.pt`` file that may be trained on.
    """
    known = {Path(r.path).name: r for r in read_regions(root)} if (root / "regions.csv").exists() else {}
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        raise DataError(f"expected feature grids (*.pt) in {folder}, found none; run `dino extract` first")
    partitions = _partitions(root)
    entries = []
    for path in keep_partition(paths, lambda p: known[p.name].slide_id if p.name in known else slide_of(p), partitions):
        region = known.get(path.name)
        if region is None:
            entries.append(GridEntry(path))
        else:
            entries.append(GridEntry(path, region.slide_id, region.grid, region.tissue))
    if not entries:
        raise DataError(f"expected grids with partition blank or pretrain in {folder}, found only held-out slides")
    if not known:
        progress.say(
            f"{folder}: no regions.csv; grids are taken as square, rows as row-major (grid_order=xy turns them)"
        )
    return entries


def _partitions(root: Path) -> dict[str, str]:
    """Partition of each slide under ``root``; for a slide that was excluded later or failed, that word instead."""
    if not (root / "slides_status.csv").exists():
        return {}
    return {slide: row.partition if row.status == OK else row.status for slide, row in read_status(root).items()}


def _start(config: PretrainConfig) -> LoadedBackbone | None:
    return load_backbone_file(config.model.init, config.model.init_arch) if config.model.init else None


def _geometry(root: Path) -> dict[str, Any]:
    """Spacing and size of the tiles under ``root``, where ``dino tile`` recorded them."""
    if not (root / "tiling.json").exists():
        return {"spacing_um": None, "tile_size_px": None}
    geometry = read_tiling(root).geometry
    return {"spacing_um": geometry.spacing_um, "tile_size_px": geometry.tile_size_px}


def _slides(root: Path, slide_ids: set[str]) -> dict[str, list[str]]:
    status = read_status(root) if (root / "slides_status.csv").exists() else {}
    patients = {status[slide].patient_id for slide in slide_ids if slide in status}
    return {"slide_ids": sorted(slide_ids), "patient_ids": sorted(p for p in patients if p)}
