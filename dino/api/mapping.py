"""``attention``: maps of the attention of both levels over whole slides."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dino import distributed, progress
from dino.api.map_models import load_models
from dino.api.roots import Root
from dino.config.schema import AttentionConfig
from dino.errors import ConfigError, DataError
from dino.extraction.attention import AttentionModels, Cell
from dino.extraction.embed import ROLLOUT, check_settings
from dino.extraction.map_record import MapFiles, map_record
from dino.files import oserror_to_data_error
from dino.slides.tables import RegionRecord, SlideTiles, read_slide_tiles
from dino.slides.tiled import TiledSlides

METHODS = ("last", ROLLOUT)
TIMEOUT_MINUTES = 7 * 24 * 60.0  # the process that ends first waits for the others


@dataclass(frozen=True)
class AttentionSummary:
    """Result of :func:`attention`.

    Attributes:
        written: The files, by slide.
        skipped: Files that the same models wrote before with the same settings, by slide.
        failures: Slides that failed, with the reason.
    """

    written: dict[str, Path] = field(default_factory=dict)
    skipped: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, or 2 if a slide failed."""
        return 2 if self.failures else 0


def attention(models: Sequence[str], root: Path, output: Path | None, config: AttentionConfig) -> AttentionSummary:
    """Write the attention over slides as OME-TIFF pyramids, see :mod:`dino.extraction.attention`.

    Under ``torchrun`` the slides are distributed over the processes. What made the maps is recorded in
    ``attention.json`` and in each file (:mod:`dino.extraction.map_record`). Files that the same models wrote before
    with the same settings are skipped.

    Args:
        models: A level-1 model, and a level-2 model if its attention and the product are wanted.
        root: ROOT that ``dino tile`` wrote; for level 2 with the grids that its level 1 extracted.
        output: Folder of the files; None for ``ROOT/attention_<encoder>``, where `dino view` finds them.
        config: Settings.

    Returns:
        What was written. A slide that cannot be read does not stop the others.

    Raises:
        CheckpointError: If a model cannot be loaded.
        ConfigError: If a setting is invalid, tifffile is not installed, or there is no level-1 model.
        DataError: If ROOT does not contain what the models need, the folder has maps of other models or settings, or
            the disk cannot be written.
    """
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"expected to read the ROOT at {root}, found no permission; ask for it, or copy the folder")
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(
            f"expected the ROOT of `dino tile` at {root}, found {found}; the words are MODEL [REGION_MODEL] ROOT [OUT]"
        )
    device = distributed.choose_device(config.device)
    check_settings(config.precision, config.batch_size, config.num_workers, device)
    if config.offsets < 1 or config.stride < 1:
        raise ConfigError(f"expected offsets and stride of at least 1, found {config.offsets} and {config.stride}")
    if config.method not in METHODS:
        raise ConfigError(f"expected method {' or '.join(METHODS)}, found '{config.method}'")
    with distributed.process_group(device, TIMEOUT_MINUTES):
        return _attention(models, root, output, config, device)


def _attention(
    models: Sequence[str], root: Path, output: Path | None, config: AttentionConfig, device: torch.device
) -> AttentionSummary:
    """:func:`attention` with checked settings; the slides are distributed over the processes."""
    loaded, found, summary = load_models(models, config), Root(root, config.grids), AttentionSummary()
    tile, region = loaded.tile, loaded.region
    output = output or found.attention_folder(tile.source)
    slides = found.tiled_slides(config.slides)
    work = _work(found, region is not None, config)
    if all(slides.path(slide_id) is None for slide_id in work):
        slides.check_present(list(work))  # one line instead of one of each slide
    record = map_record(tile, region, loaded.check(found), slides.geometry, config)
    files = MapFiles(output, record)
    distributed.run_on_main(files.prepare)
    job = _Job(AttentionModels(tile, region, config, device, output), slides, found, files)
    sizes = [len(tiles.coords) for tiles, _ in work.values()]
    own = set(distributed.assign(sizes, distributed.world_size())[distributed.rank()])
    with oserror_to_data_error(output):
        for number, (slide_id, (tiles, regions)) in enumerate(work.items()):
            if number not in own:
                continue
            try:
                path, new = job.map(tiles, regions)
                (summary.written if new else summary.skipped)[slide_id] = path
            except DataError as error:
                summary.failures[slide_id] = str(error)
    return _together(distributed.gather(summary), list(work), output)


def _together(parts: Sequence[AttentionSummary], slides: Sequence[str], output: Path) -> AttentionSummary:
    """The summary of all processes, in the order of the slides; it is also printed."""
    written = {slide: path for part in parts for slide, path in part.written.items()}
    skipped = {slide: path for part in parts for slide, path in part.skipped.items()}
    failures = {slide: reason for part in parts for slide, reason in part.failures.items()}
    for slide_id, reason in failures.items():
        progress.warn(f"{slide_id}: {reason}")
    before = f", {len(skipped)} written before" if skipped else ""
    progress.say(f"{len(written)} of {len(slides)} slides{before}: {output}")
    written, skipped = ({slide: of[slide] for slide in slides if slide in of} for of in (written, skipped))
    return AttentionSummary(written, skipped, failures)


def _work(root: Root, with_regions: bool, config: AttentionConfig) -> dict[str, tuple[SlideTiles, list[RegionRecord]]]:
    """Tiles and regions of the slides to map.

    Raises:
        DataError: If there are none.
    """
    tiles, regions = read_slide_tiles(root.path), root.regions() if with_regions else []
    chosen = list(tiles) if config.slide is None else [config.slide]
    missing = next((slide for slide in chosen if slide not in tiles), None)
    if missing is not None or not tiles:
        known = ", ".join(list(tiles)[:3]) or "none"
        raise DataError(f"expected tiles of slide '{missing}' in {root.path}, found slides {known}; check slide=")
    work = {slide: (tiles[slide], [one for one in regions if one.slide_id == slide]) for slide in chosen}
    if with_regions and not any(found for _, found in work.values()):
        raise DataError(f"expected regions for the level-2 model in {root.path}, found none; omit the level-2 model")
    return work


@dataclass(frozen=True)
class _Job:
    """What the maps of all slides have in common.

    Attributes:
        networks: The models.
        slides: The slides.
        root: ROOT.
        files: The files.
    """

    networks: AttentionModels
    slides: TiledSlides
    root: Root
    files: MapFiles

    def map(self, tiles: SlideTiles, regions: Sequence[RegionRecord]) -> tuple[Path, bool]:
        """Map one slide and write the file, unless it was written before; the file, and whether it is new.

        Raises:
            DataError: If the slide or its grids cannot be read.
        """
        file = self.files.of(tiles.slide_id, tiles.coords, [(one.x, one.y) for one in regions])
        if file.is_written():
            return file.path, False
        step, region = tiles.step_lv0, self.networks.region
        features: dict[Cell, np.ndarray] = {}
        if region is not None:
            features = self.root.features_of_cells(regions, region.grids, region.source)
        on_lattice = tiles.coords[(tiles.coords % step == 0).all(1)] // step  # (N, 2) column, row
        cells = list(features) or [(int(row), int(column)) for column, row in on_lattice]
        with (
            self.slides.open(tiles.slide_id, step) as reader,
            progress.bar(f"attention: {tiles.slide_id}", len(cells) * self.networks.config.offsets**2) as bar,
        ):
            maps = self.networks.maps(reader, cells, features, bar.advance)
            spacing = reader.spacing_um * maps.token_lv0
        file.write(maps.channels, maps.names(), maps.tile.shape[1:], spacing)
        progress.say(f"{file.path}: {', '.join(maps.names())}; {spacing:g} µm/px")
        return file.path, True
