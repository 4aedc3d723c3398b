"""Where the tiles of a run come from: tile files, tar or parquet shards, or the slides themselves."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dino.api.balancing import build_groups, describe
from dino.api.joining import check_slide_ids, joined_filter, joined_geometry, joined_held_out, joined_status
from dino.api.roots import HeldOut, Root, Split, check_held_out, slides_of
from dino.config.schema import PatchConfig
from dino.crops.parameters import SPACINGS, picture_spacings
from dino.data import Dataset, EncodedTiles, FolderTiles, Groups, TileDataset
from dino.data.datasets import SomeTiles
from dino.data.joined import JoinedDataset
from dino.data.shard_index import ShardIndex, Shards, damage_of
from dino.data.shards import (
    PARQUET,
    TAR,
    ParquetTiles,
    ShardTiles,
    TarTiles,
    open_parquet,
    open_tars,
    shard_folder,
    shard_kind,
)
from dino.data.slide_tiles import Placement, SlideTileDataset
from dino.errors import ConfigError
from dino.slides.remote_cache import SlideCache

AUTO, FILES, SLIDES = "auto", "files", "slides"
SOURCE_OF_STORAGE = {"jpeg": FILES, "tar": TAR, "parquet": PARQUET, "none": SLIDES}  # of a ROOT by its tiling


class Found(NamedTuple):
    """The tiles of a data folder, how many are held out, and what to warn of and to say."""

    dataset: Dataset
    held_out: HeldOut
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TileSource:
    """The tiles that a run is trained on.

    Attributes:
        dataset: The tiles.
        split: How many there are, and how many are held out.
        geometry: Spacing and tile size where known.
        slides: ``slide_ids`` and ``patient_ids`` as far as they are known.
        warnings: What to tell the user about the data.
        groups: Groups that share the draws; None to draw every tile equally often.
        filtered: What a filter left out, for ``status.json``; None without one.
        notes: What else to say of the data.
    """

    dataset: Dataset
    split: Split
    geometry: dict[str, Any]
    slides: dict[str, list[str]]
    warnings: list[str]
    groups: Groups | None = None
    filtered: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def open_tiles(config: PatchConfig) -> TileSource:
    """Find the tiles of a run.

    Args:
        config: Its settings: ``source`` and what the data folder holds decide where they are read from.

    Raises:
        ConfigError: If settings do not fit the source.
        DataError: If there are no tiles that may be trained on.
    """
    roots = [Root(Path(folder)) for folder in (config.data_dir, *config.more_data_dirs)]
    check_held_out(roots)
    for root in roots:
        root.select(config.filter)
    sources = [source_of(root, config) for root in roots]
    opened = [SOURCES[source](root, config) for source, root in zip(sources, roots, strict=True)]
    datasets = [one.dataset for one in opened]
    dataset, status = datasets[0] if len(roots) == 1 else JoinedDataset(datasets), joined_status(roots)
    geometry = joined_geometry(roots, [_geometry(root, config) for root in roots])
    slides = slides_of(dataset.slide_ids, status)
    parts = [(root.path, part) for root, part in zip(roots, datasets, strict=True)]
    groups = build_groups(config.sampling, parts, status, config.seed)
    samples = groups.samples if groups is not None else len(dataset)
    split = Split("tiles", samples, len(slides["slide_ids"]), joined_held_out([one.held_out for one in opened]))
    warnings = check_slide_ids(roots, datasets)
    for root, found in zip(roots, opened, strict=True):
        warnings += [*found.warnings, *root.unknown_partitions()]
    reading = [_reading(source, root, config) for source, root in zip(sources, roots, strict=True)]
    notes = [line for line in dict.fromkeys(reading) if line]
    notes += [line for found in opened for line in found.notes]
    notes += [*(str(root.selection) for root in roots if root.selection), *describe(groups)]
    return TileSource(dataset, split, geometry, slides, warnings, groups, joined_filter(roots), notes)


def _geometry(root: Root, config: PatchConfig) -> dict[str, Any]:
    """Spacings and size of the tiles of a data folder."""
    geometry = root.geometry()
    if spacings := [*config.sampling.spacing_um] or [*_pictures(root, config)]:
        known = geometry["spacing_um"] in spacings
        geometry |= {"spacings_um": spacings, "spacing_um": geometry["spacing_um"] if known else spacings[0]}
    return geometry


def _pictures(root: Root, config: PatchConfig) -> tuple[float, ...]:
    """Spacings of the pictures that the crops of a sample are cut from; nothing where they are cut from one."""
    return picture_spacings(config.aug, root.tiling.geometry.spacing_um) if root.tiling else ()


def _reading(source: str, root: Root, config: PatchConfig) -> str:
    """A line on where and how tiles are read; empty for tile files."""
    sampling = config.sampling
    if source == FILES:
        return ""
    shifted = f", shifted by up to {sampling.jitter_px} px" if sampling.jitter_px else ""
    spacings = " or ".join(f"{spacing:g}" for spacing in sampling.spacing_um)
    at = f", at {spacings} µm/px" if spacings else ""
    if pictures := _pictures(root, config):
        at = ", global crops at {:g} and local crops at {:g} µm/px about the same centre".format(*pictures)
    return f"tiles are read from {source}{shifted}{at}"


def source_of(root: Root, config: PatchConfig) -> str:
    """The name of the source of a run's tiles in :data:`SOURCES`.

    Raises:
        ConfigError: If ``config.source`` is none of them.
    """
    if config.source == AUTO:
        return SOURCE_OF_STORAGE.get(root.tiling.storage, FILES) if root.tiling else shard_kind(root.path) or FILES
    if config.source not in SOURCES:
        raise ConfigError(f"expected source {', '.join((AUTO, *SOURCES))}, found '{config.source}'")
    return config.source


def _files(root: Root, config: PatchConfig) -> Found:
    """Image files in a folder."""
    _check_stored(config)
    folder, names, held_out = root.tiles()
    files = FolderTiles(folder, [names[i] for i in root.kept(names)], config.speed.ram_cache)
    return Found(TileDataset(files, root.slide_infos(root.tile_spacings())), held_out)


def _tar(root: Root, config: PatchConfig) -> Found:
    """Tar files."""
    return _shards(TarTiles, root, config, partial(open_tars, of_slides=root.tiling is not None))


def _parquet(root: Root, config: PatchConfig) -> Found:
    """Parquet files."""
    return _shards(ParquetTiles, root, config, open_parquet)


def _shards(
    tiles: type[ShardTiles], root: Root, config: PatchConfig, open_shards: Callable[..., tuple[Shards, ShardIndex]]
) -> Found:
    _check_stored(config)
    _check_no_ram_cache(config, "shards")
    folder = shard_folder(root.path, tiled=root.tiling is not None, kind=tiles.kind)
    shards, index = open_shards(folder, config.speed.cache_dir, may_write=not config.dry_run)
    warnings = damage_of(index)
    counts = index.ranges.counts
    trained, held_out = root.split_slides(counts, folder)
    index = index.without({*counts} - {*trained})
    stored: EncodedTiles = tiles(shards, index)
    if root.selection:
        stored = SomeTiles(stored, root.kept(stored.names))
    return Found(TileDataset(stored, root.slide_infos(root.tile_spacings())), held_out, warnings)


def _slides(root: Root, config: PatchConfig) -> Found:
    """The slides that were tiled."""
    _check_no_ram_cache(config, "slides")
    speed = config.speed
    cache = SlideCache(speed.slide_cache, speed.slide_cache_gb)
    slides = replace(root.tiled_slides(config.slides), cache=cache)
    tiles, held_out = root.listed_tiles()
    slides.check_present(one.slide_id for one in tiles)
    kept_open, notes, warnings = slides.check_cache(
        (one.slide_id for one in tiles),
        max(1, speed.open_slides),
        max(1, speed.num_workers),
        "speed.slide_cache_gb",
        "speed.num_workers",
    )
    geometry = slides.geometry
    spacing, size = geometry.spacing_um, geometry.tile_size_px
    placement = Placement.of(config.sampling, spacing, size, config.seed, _pictures(root, config))
    infos = root.slide_infos({one.slide_id: one.spacing_um for one in tiles})
    return Found(SlideTileDataset(tiles, slides, infos, placement, kept_open), held_out, warnings, notes)


def stored_tars(root: Root, cache_dir: str, slides: Collection[str | None]) -> TarTiles | None:
    """The tiles of a data folder that are in tar files; None if it has none.

    Args:
        root: The data folder.
        cache_dir: Where the index of shards is kept.
        slides: Slides whose tiles are meant, and None for tiles of unknown slides; None alone for all.

    Raises:
        DataError: If they cannot be used.
    """
    kind = root.tiling.storage if root.tiling else shard_kind(root.path)
    if kind != TAR:
        return None
    folder = shard_folder(root.path, tiled=root.tiling is not None, kind=TAR)
    shards, index = open_tars(folder, cache_dir, of_slides=root.tiling is not None, may_write=False)
    trained, _ = root.split_slides(index.ranges.counts, folder)
    kept = {slide for slide in trained if len(slides) == 1 or slide in slides}
    return TarTiles(shards, index.without({*index.ranges.counts} - kept))


def _check_no_ram_cache(config: PatchConfig, source: str) -> None:
    """Raise ConfigError if decoded tiles should be kept in memory, which is for tile files."""
    if config.speed.ram_cache:
        raise ConfigError(
            f"expected no speed.ram_cache for tiles that are read from {source}, found {config.speed.ram_cache:g}; "
            "leave it out"
        )


def _check_stored(config: PatchConfig) -> None:
    """Raise ConfigError for settings of which stored tiles know nothing."""
    places = {f"sampling.{name}": getattr(config.sampling, name) for name in ("jitter_px", "spacing_um")}
    for name, value in (places | {f"aug.{name}": getattr(config.aug, name) for name in SPACINGS}).items():
        if value:
            raise ConfigError(
                f"expected tiles that are read from slides for {name}={value}, found tile files, whose places are "
                "fixed; add source=slides"
            )


SOURCES: Mapping[str, Callable[[Root, PatchConfig], Found]] = {
    FILES: _files,
    TAR: _tar,
    PARQUET: _parquet,
    SLIDES: _slides,
}
