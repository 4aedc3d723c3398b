"""What a level-1 extraction reads: the tiles and regions of ROOT, and where their pixels are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dino import progress
from dino.config.schema import ExtractConfig
from dino.errors import ConfigError, DataError
from dino.extraction.embed import FEATURES, PATCHES
from dino.extraction.pixels import REGIONS, SLIDES, TILES, RegionImage, list_region_images, match_region_images
from dino.extraction.tile_files import STORAGE, tile_attributes
from dino.models.weights import LoadedBackbone
from dino.slides.reader import BACKEND, RESAMPLER
from dino.slides.remote import Location
from dino.slides.remote_cache import SlideCache
from dino.slides.tables import (
    REGIONS_TABLE,
    STATUS_TABLE,
    TILING_FILE,
    RegionRecord,
    SlideTiles,
    Tiling,
    read_regions,
    read_slide_tiles,
    read_status,
    read_tiling,
    tile_table,
)
from dino.slides.tiled import TiledSlides, slide_paths

SOURCES = ("auto", SLIDES, TILES, REGIONS)
BOTH = "both"
WHAT = (BOTH, TILES, REGIONS)
DEFAULT_TILE_PX = 256


def check_settings(config: ExtractConfig) -> None:
    """Check the settings of a level-1 extraction.

    Raises:
        ConfigError: If one is unknown, or two do not go together.
    """
    choices = {"what": WHAT, "source": SOURCES, "features": FEATURES, "storage": tuple(STORAGE)}
    for name, words in choices.items():
        if getattr(config, name) not in words:
            raise ConfigError(f"expected {name} {', '.join(words)}, found '{getattr(config, name)}'")
    if config.features == PATCHES and config.what != TILES:
        raise ConfigError(f"expected what=tiles for features={PATCHES}, found what={config.what}; add what=tiles")
    if config.source == REGIONS and config.what == TILES:
        raise ConfigError("expected source=slides or tiles for what=tiles, found images of regions; set source=slides")


@dataclass(frozen=True)
class PixelSource:
    """The source of the pixels of an extraction.

    Attributes:
        root: ROOT.
        tile_size_px: Size of a cell.
        slides: Its slides; None for a folder of region images.
    """

    root: Path
    tile_size_px: int
    slides: TiledSlides | None = None

    def slide_path(self, slide_id: str) -> Location | None:
        """The slide's file, or where it is stored; None if a local one does not exist."""
        return self.slides.path(slide_id) if self.slides else None

    def record(self) -> dict[str, Any]:
        """The entries of ``extract.json`` that describe it."""
        geometry = asdict(self.slides.geometry) if self.slides else {"tile_size_px": self.tile_size_px}
        return {"geometry": geometry, "backend": BACKEND, "resampler": RESAMPLER}

    def attributes(self, tiles: SlideTiles) -> dict[str, Any]:
        """Attributes of the coordinates of a slide's tiles."""
        assert self.slides is not None
        status, geometry = self.slides.status.get(tiles.slide_id), self.slides.geometry
        return tile_attributes(tiles, self.tile_size_px, geometry.spacing_um, geometry.overlap, status)


@dataclass(frozen=True)
class Inputs:
    """What an extraction reads.

    Attributes:
        source: The source of the pixels.
        records: All regions.
        tiles: All tiles, by slide; empty where they are not to be written.
        pixels: ``auto`` (the slide if its file exists, else its tiles), ``slides``, ``tiles`` or ``regions``.
        images: The images of the regions, in the same order, if pixels are read from images.
    """

    source: PixelSource
    records: Sequence[RegionRecord]
    tiles: Mapping[str, SlideTiles]
    pixels: str
    images: Sequence[RegionImage]


def find_inputs(root: Path, config: ExtractConfig, loaded: LoadedBackbone) -> Inputs:
    """Find tiles, regions and their pixels.

    Args:
        root: ROOT.
        config: Settings.
        loaded: The model.

    Raises:
        DataError: If ROOT does not contain what the settings need, or was tiled at another spacing than the model's.
    """
    what, pixels = config.what, config.source
    if not (root / TILING_FILE).exists():
        if what == TILES or pixels not in ("auto", REGIONS):
            setting = f"what={what}" if what == TILES else f"source={pixels}"
            raise DataError(f"expected {root / TILING_FILE} for {setting}, found none; run `dino tile`")
        source = PixelSource(root, loaded.tile_size_px or DEFAULT_TILE_PX)
        images = list_region_images(root, source.tile_size_px, loaded.spacing_um)
        return Inputs(source, [image.record for image in images], {}, REGIONS, images)
    source = _tiled(root, config, loaded)
    records = read_regions(root) if what != TILES or (root / REGIONS_TABLE).exists() else []
    if pixels == REGIONS:
        tiles = {}
    else:
        listed = what == TILES or tile_table(root).exists()
        tiles = read_slide_tiles(root) if what != REGIONS and listed else {}
    if what == TILES and not tiles:
        raise DataError(f"expected tiles in {tile_table(root)}, found none; tile the slides again")
    if not records and not tiles:
        raise DataError(
            f"expected regions in {root / REGIONS_TABLE}, found none; tile with a smaller region_size_px into "
            "another ROOT, or extract the tiles (what=tiles)"
        )
    if what == BOTH and not (records and tiles):
        absent, left = ("tiles", "regions") if records else ("regions", "tiles")
        reason = "whose pixels images of regions have" if pixels == REGIONS else f"in {absent}.csv"
        progress.say(f"{root}: no {absent} {reason}; only features of {left} are written")
    images = match_region_images(root, records) if pixels == REGIONS else []
    return Inputs(source, records, tiles, pixels, images)


def check_geometry(tiling: Tiling, loaded: LoadedBackbone, root: Path) -> None:
    """Check that tiles are of the spacing that a level-1 model was trained at; warn of another size.

    Args:
        tiling: How the slides were tiled.
        loaded: The model.
        root: ROOT, for messages.

    Raises:
        DataError: If they are of another spacing.
    """
    geometry = tiling.geometry
    trained = loaded.spacings_um or [one for one in (loaded.spacing_um,) if one]
    found = geometry.spacing_um
    if trained and all(abs(spacing - found) > geometry.tolerance * spacing for spacing in trained):
        known = " or ".join(f"{spacing:g}" for spacing in trained)
        raise DataError(
            f"expected a ROOT tiled at the {known} µm/px that {loaded.source} was trained at, found "
            f"{found:g} in {root}; tile the slides at spacing_um={trained[0]:g} into another ROOT"
        )
    if loaded.tile_size_px and loaded.tile_size_px != geometry.tile_size_px:
        progress.warn(
            f"the model was trained on tiles of {loaded.tile_size_px} px, but the tiles of this ROOT have "
            f"{geometry.tile_size_px} px"
        )


def _tiled(root: Path, config: ExtractConfig, loaded: LoadedBackbone) -> PixelSource:
    """The source of a ROOT that ``dino tile`` wrote."""
    tiling = read_tiling(root)
    check_geometry(tiling, loaded, root)
    status = read_status(root) if (root / STATUS_TABLE).exists() else {}
    cache = SlideCache(config.slide_cache, config.slide_cache_gb)
    slides = TiledSlides(tiling.geometry, status, slide_paths(config.slides), tiling.reader, cache=cache)
    return PixelSource(root, tiling.geometry.tile_size_px, slides)
