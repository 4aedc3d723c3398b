"""``attention``: maps of the attention of both levels over whole slides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dino import distributed, progress
from dino.api.roots import Root
from dino.config.schema import AttentionConfig
from dino.errors import ConfigError, DataError
from dino.extraction.attention import AttentionModels, Cell
from dino.extraction.embed import ROLLOUT, check_settings
from dino.extraction.pyramid import write_pyramid
from dino.files import oserror_to_data_error
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.slides.tables import RegionRecord, SlideTiles, read_slide_tiles
from dino.slides.tiled import TiledSlides

METHODS = ("last", ROLLOUT)
TIMEOUT_MINUTES = 7 * 24 * 60.0  # the process that ends first waits for the others


@dataclass(frozen=True)
class AttentionSummary:
    """Result of :func:`attention`.

    Attributes:
        written: The files, by slide.
        failures: Slides that failed, with the reason.
    """

    written: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, or 2 if a slide failed."""
        return 2 if self.failures else 0


def attention(models: Sequence[str], root: Path, output: Path | None, config: AttentionConfig) -> AttentionSummary:
    """Write the attention over slides as OME-TIFF pyramids, see :mod:`dino.extraction.attention`.

    Under ``torchrun`` the slides are distributed over the processes.

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
        DataError: If ROOT does not contain what the models need, or the disk cannot be written.
    """
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
    tile, region = _by_level([load_backbone_file(model, config.arch, config.transform) for model in models])
    found, summary = Root(root, config.grids), AttentionSummary()
    output = output or found.attention_folder(tile.source)
    slides, work = found.tiled_slides(config.slides), _work(found, region, config)
    networks = AttentionModels(tile, region, config, device, output)
    sizes = [len(tiles.coords) for tiles, _ in work.values()]
    own = set(distributed.assign(sizes, distributed.world_size())[distributed.rank()])
    with oserror_to_data_error(output):
        output.mkdir(parents=True, exist_ok=True)
        for number, (slide_id, (tiles, regions)) in enumerate(work.items()):
            if number not in own:
                continue
            try:
                summary.written[slide_id] = _map(networks, slides, tiles, regions, found, output)
            except DataError as error:
                summary.failures[slide_id] = str(error)
    parts = distributed.gather(summary)
    written = {slide: path for part in parts for slide, path in part.written.items()}
    failures = {slide: reason for part in parts for slide, reason in part.failures.items()}
    for slide_id, reason in failures.items():
        progress.warn(f"{slide_id}: {reason}")
    progress.say(f"{len(written)} of {len(work)} slides: {output}")
    return AttentionSummary({slide: written[slide] for slide in work if slide in written}, failures)


def _by_level(loaded: Sequence[LoadedBackbone]) -> tuple[LoadedBackbone, LoadedBackbone | None]:
    """The level-1 and the level-2 model.

    Raises:
        ConfigError: If there is not one of level 1, and at most one of level 2.
        DataError: If level 2 was trained on features of another level-1 model.
    """
    tile = [one for one in loaded if one.transform is not None]
    region = [one for one in loaded if one.transform is None]  # of feature grids
    if len(tile) != 1 or len(region) > 1:
        raise ConfigError(
            f"expected a level-1 model, and at most one level-2 model, found {len(tile)} and {len(region)}: "
            f"{', '.join(one.source for one in loaded)}"
        )
    expected = region[0].grids if region else None
    if expected and expected.fingerprint != tile[0].fingerprint:
        raise DataError(
            f"expected the level-1 model {expected.name} whose features {region[0].source} was trained on, found "
            f"{tile[0].source}, which is another one"
        )
    return tile[0], region[0] if region else None


def _work(
    root: Root, region: LoadedBackbone | None, config: AttentionConfig
) -> dict[str, tuple[SlideTiles, list[RegionRecord]]]:
    """Tiles and regions of the slides to map.

    Raises:
        DataError: If there are none.
    """
    tiles, regions = read_slide_tiles(root.path), root.regions() if region else []
    chosen = list(tiles) if config.slide is None else [config.slide]
    missing = next((slide for slide in chosen if slide not in tiles), None)
    if missing is not None or not tiles:
        known = ", ".join(list(tiles)[:3]) or "none"
        raise DataError(f"expected tiles of slide '{missing}' in {root.path}, found slides {known}; check slide=")
    work = {slide: (tiles[slide], [one for one in regions if one.slide_id == slide]) for slide in chosen}
    if region and not any(found for _, found in work.values()):
        raise DataError(f"expected regions for the level-2 model in {root.path}, found none; omit the level-2 model")
    return work


def _map(
    networks: AttentionModels,
    slides: TiledSlides,
    tiles: SlideTiles,
    regions: Sequence[RegionRecord],
    root: Root,
    output: Path,
) -> Path:
    """Map one slide, and write the file."""
    step, region = tiles.step_lv0, networks.region
    features: dict[Cell, np.ndarray] = {}
    if region is not None:
        features = root.features_of_cells(regions, region.grids, region.source)
    on_lattice = tiles.coords[(tiles.coords % step == 0).all(1)] // step  # (N, 2) column, row
    cells = list(features) or [(int(row), int(column)) for column, row in on_lattice]
    with (
        slides.open(tiles.slide_id, step) as reader,
        progress.bar(f"attention: {tiles.slide_id}", len(cells) * networks.config.offsets**2) as bar,
    ):
        maps = networks.maps(reader, cells, features, bar.advance)
        spacing = reader.spacing_um * maps.token_lv0
    path = output / f"{tiles.slide_id}.ome.tif"
    write_pyramid(path, maps.channels, maps.names(), maps.tile.shape[1:], spacing)
    progress.say(f"{path}: {', '.join(maps.names())}; {spacing:g} µm/px")
    return path
