"""What a ROOT contains, for the viewer, words and exports: slides, their tiles and regions, encoders with features."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dino import progress
from dino.errors import DataError
from dino.extraction.folders import tile_folder
from dino.extraction.pyramid import SUFFIX
from dino.slides.tables import (
    COORDINATES_FOLDER,
    REGIONS_TABLE,
    RegionRecord,
    SlideTiles,
    Tiling,
    read_regions,
    read_slide_tiles,
    read_status,
    read_tiling,
)
from dino.slides.tiled import TiledSlides, slide_paths

ENCODER_PREFIX, ATTENTION_PREFIX = "features_", "attention_"


@dataclass(frozen=True)
class Catalogue:
    """The tables of a ROOT.

    Attributes:
        root: ROOT.
        tiling: How its slides were tiled.
        slides: Its slides and where their files are.
        tiles: Tiles of each slide that has any.
        regions: Regions of each slide that has any.
    """

    root: Path
    tiling: Tiling
    slides: TiledSlides
    tiles: Mapping[str, SlideTiles]
    regions: Mapping[str, Sequence[RegionRecord]]

    @property
    def encoders(self) -> list[str]:
        """Names of the encoders with features of tiles, sorted."""
        folders = (path for path in self.root.glob(f"{ENCODER_PREFIX}*") if path.is_dir() and any(path.glob("*.h5")))
        return sorted(path.name.removeprefix(ENCODER_PREFIX) for path in folders)

    @property
    def attention_folders(self) -> dict[str, Path]:
        """Folders of attention maps by the name of their encoder, sorted."""
        folders = (path for path in self.root.glob(f"{ATTENTION_PREFIX}*") if path.is_dir())
        found = (path for path in folders if any(path.glob(f"[!.]*{SUFFIX}")))
        return {path.name.removeprefix(ATTENTION_PREFIX): path for path in sorted(found)}

    def patient(self, slide_id: str) -> str:
        """The patient of a slide; the slide itself where none is recorded."""
        return self.slides.status[slide_id].patient_id or slide_id

    def region_of(self, slide_id: str, tile: int) -> int | None:
        """Index of the region that contains a tile; of several the one whose middle is nearest, None without one."""
        tiles = self.tiles[slide_id]
        x, y = (tiles.coords[tile] + tiles.step_lv0 / 2).tolist()
        found: list[tuple[float, int]] = []
        for index, one in enumerate(self.regions.get(slide_id, ())):
            height, width = (cells * one.step_lv0 for cells in one.grid)
            if one.x <= x < one.x + width and one.y <= y < one.y + height:
                found.append(((one.x + width / 2 - x) ** 2 + (one.y + height / 2 - y) ** 2, index))
        return min(found)[1] if found else None

    def check_slides(self) -> None:
        """Warn about slides whose files do not exist.

        Raises:
            DataError: If no slide has its file.
        """
        tiled = list(self.tiles) or list(self.slides.status)
        absent = [slide_id for slide_id in tiled if self.slides.path(slide_id) is None]
        if len(absent) == len(tiled):
            self.slides.check_present(absent)
        if absent:
            progress.warn(
                f"{len(absent)} of {len(tiled)} slides cannot be shown, because their files were moved (the first: "
                f"'{absent[0]}'); name their folder or slides.csv with slides="
            )

    def chosen_encoders(self, wanted: Sequence[str]) -> list[str]:
        """The encoders to show: the wanted ones first.

        Raises:
            DataError: If ROOT has no features of a wanted one.
        """
        found = self.encoders
        for name in wanted:
            if name not in found:
                raise DataError(
                    f"expected features of '{name}' in {tile_folder(self.root, name)}, found none (encoders: "
                    f"{', '.join(found) or 'none'}); run `dino extract RUN {self.root} what=tiles encoder={name}`"
                )
        return [*dict.fromkeys(wanted), *(name for name in found if name not in wanted)]


def read_catalogue(root: Path, slides: str | None = None) -> Catalogue:
    """Read the tables of a ROOT.

    Args:
        root: ROOT of ``dino tile``.
        slides: Folder or slides.csv of slides that were moved; None if they were not.

    Raises:
        DataError: If it is not one, or a table is damaged.
    """
    if not root.is_dir():
        raise DataError(f"expected the ROOT of `dino tile` at {root}, found {'a file' if root.exists() else 'nothing'}")
    tiling, status = read_tiling(root), read_status(root)
    if not status:
        raise DataError(f"expected slides in {root}, found none; tile at least one ({COORDINATES_FOLDER} is empty)")
    regions: dict[str, list[RegionRecord]] = defaultdict(list)
    for record in read_regions(root) if (root / REGIONS_TABLE).exists() else ():
        regions[record.slide_id].append(record)
    tiles = {slide_id: found for slide_id, found in read_slide_tiles(root).items() if slide_id in status}
    return Catalogue(root, tiling, TiledSlides(tiling.geometry, status, slide_paths(slides)), tiles, regions)
