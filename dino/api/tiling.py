"""`dino tile`: slides to tiles and regions."""

from collections.abc import Sequence
from pathlib import Path

from dino import progress
from dino.config.load import identity_of
from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError
from dino.slides.lattice import Geometry, cells_per_side
from dino.slides.slide import TilingPlan
from dino.slides.slide_list import read_slide_list
from dino.slides.tiling import TilingSummary, measure_slides, tile_slides
from dino.slides.tissue import TissueRule


def tile(inputs: Sequence[Path], root: Path, config: TileConfig | None = None) -> TilingSummary:
    """Find tissue on every slide, cut its tiles, list its regions, and write tables and previews under ``root``.

    Slides that an earlier call with the same settings finished are kept as they are. A slide that cannot be tiled does
    not stop the others: it stands as ``failed`` in ``slides_status.csv`` and in the summary. With more than one worker
    and more than one slide, processes are spawned: a script calls this under ``if __name__ == "__main__"``.

    Args:
        inputs: Slide files, folders of slides, patterns, or ``slides.csv`` lists.
        root: Output folder.
        config: Settings; the defaults if None. ``dry_run`` writes nothing and estimates instead.

    Returns:
        What became of each slide; its ``exit_code`` is 2 if any failed.

    Raises:
        ConfigError: If a setting is out of range.
        DataError: If the list is malformed or a file of it missing, or ``root`` was tiled with other settings.
    """
    config = config or TileConfig()
    plan = plan_of(config)
    root = Path(root).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise DataError(f"expected a folder to write to, found the file {root}")
    records = read_slide_list(inputs, note=progress.warn)
    run = measure_slides if config.dry_run else tile_slides
    summary = run(records, root, plan, identity_of(config), config.num_workers)
    for line in summary.lines():
        progress.say(line)
    return summary


def plan_of(config: TileConfig) -> TilingPlan:
    """What ``config`` asks for, checked.

    Raises:
        ConfigError: If a setting is out of range or does not fit another.
    """
    if config.num_workers < 1:
        raise ConfigError(f"expected num_workers to be at least 1, found {config.num_workers}")
    return TilingPlan(
        geometry=Geometry(
            spacing_um=config.spacing_um,
            tile_size_px=config.tile_size_px,
            overlap=config.overlap,
            region_cells=cells_per_side(config.region_size_px, config.tile_size_px),
            region_overlap_cells=config.region_overlap_cells,
            tolerance=config.tolerance,
        ),
        tissue=TissueRule(
            method=config.tissue_method,
            downsample=config.tissue_downsample,
            min_tissue=config.min_tissue,
            min_tissue_region=config.min_tissue_region,
            qc=config.qc,
        ),
        storage=config.storage,
        jpeg_quality=config.jpeg_quality,
        max_tiles_per_slide=config.max_tiles_per_slide,
        seed=config.seed,
        spacing_if_missing=config.spacing_at_level_0,
        previews=config.previews,
    )
