"""Data folders: what is recorded of the tiles or feature grids in them, and which of them may be trained on."""

import os
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from dino import progress
from dino.data import GridEntry, SlideInfo, list_names, place_of, read_grid, slide_of
from dino.data.grids import SMALLEST_SIDE
from dino.errors import ConfigError, DataError
from dino.evaluate.contents import find_copies
from dino.extraction.folders import attention_folder, encoder_name, find_grids, grid_path
from dino.extraction.record import RECORD, grid_source
from dino.models.grid_source import KEY, GridSource, check_same_source, recorded
from dino.slides.filtering import PlacedTiles, Selection, read_places, select_tiles
from dino.slides.partitions import PRETRAIN, Split, split_files, unknown_values
from dino.slides.tables import (
    COORDINATES_FOLDER,
    OK,
    REGIONS_FOLDER,
    REGIONS_TABLE,
    STATUS_TABLE,
    TILES_FOLDER,
    TILING_FILE,
    RegionRecord,
    SlideStatus,
    Tiling,
    read_regions,
    read_status,
    read_tile_spacings,
    read_tiling,
    tile_table,
)
from dino.slides.tiled import TiledSlides, slide_paths

__all__ = ["Root", "Split", "check_grids", "origin_of_grids", "shapes_of_grids", "source_of_grids"]

HeldOut = dict[str, tuple[int, int]]  # number of slides and of their samples by partition


class Root:
    """The tables of a data folder, as far as there are any.

    Args:
        path: The folder.
        encoder: The encoder whose feature grids are meant, see :func:`dino.extraction.folders.find_grids`.

    Raises:
        DataError: If a table is damaged.
    """

    def __init__(self, path: Path, encoder: str | None = None) -> None:
        self.path, self.encoder = path, encoder
        self.tiling: Tiling | None = read_tiling(path) if (path / TILING_FILE).exists() else None
        self.status: dict[str, SlideStatus] = read_status(path) if (path / STATUS_TABLE).exists() else {}
        self.selection: Selection | None = None

    @property
    def grid_folder(self) -> Path:
        """The folder whose ``.pt`` files are the feature grids.

        Raises:
            DataError: If it is not known which of several.
        """
        folder = find_grids(self.path, self.encoder)
        return folder or (self.path / REGIONS_FOLDER if self.tiling is not None else self.path)

    def select(self, expression: str | None) -> None:
        """Leave out the tiles that do not meet a filter, see :func:`dino.slides.filtering.select_tiles`.

        Raises:
            ConfigError: If it is not one.
            DataError: If the tiles are not listed, or none is kept.
        """
        if expression is not None:
            held_out = {slide for slide, partition in self.partitions.items() if partition not in PRETRAIN}
            self.selection = select_tiles(self.path, expression, self.status, held_out)

    def kept(self, names: Sequence[str]) -> Sequence[int]:
        """Indices of the stored tiles that the filter keeps; all without one.

        Raises:
            DataError: If there are none.
        """
        if self.selection is None:
            return range(len(names))
        kept, self.selection = self.selection.of_files(names, place_of)
        if not kept:
            raise DataError(f"expected tiles under {self.path} that meet {self.selection.expression!r}, found none")
        return kept

    def tiles(self) -> tuple[Path, list[str], HeldOut]:
        """The folder of the tiles, their names in it without those of held-out slides, and counts of the latter.

        Raises:
            DataError: If there are no tiles that may be trained on.
        """
        folder = tile_folder(self)
        names, held_out = split_files(list_names(folder, {TILING_FILE: TILES_FOLDER}), slide_of, self.partitions)
        if not names:
            raise _only_held_out("tiles", folder, held_out)
        return folder, names, held_out

    def listed_tiles(self) -> tuple[list[PlacedTiles], HeldOut]:
        """The listed tiles of the slides that may be trained on, and the numbers of slides and tiles held out.

        Raises:
            DataError: If there are none, or no table of tiles.
        """
        listed, table = read_places(self.path), tile_table(self.path)
        if not listed:
            raise DataError(f"expected tiles in {table}, found none; tile the slides again")
        kept, held_out = self.split_slides({slide: len(one.places) for slide, one in listed.items()}, table)
        tiles = [listed[slide] for slide in kept if slide]
        return self.selection.of_listed(tiles) if self.selection else tiles, held_out

    def split_slides(self, counts: Mapping[str | None, int], folder: Path) -> tuple[list[str | None], HeldOut]:
        """Separate the slides that may be trained on from those that are held out.

        Args:
            counts: Number of tiles of each.
            folder: Where they are, for messages.

        Returns:
            The slides to train on, and the numbers of slides and tiles held out.

        Raises:
            DataError: If there are none that may be trained on.
        """
        kept, held_out = split_files(list(counts), lambda slide: slide, self.partitions)
        held = {
            word: [n for slide, n in counts.items() if self.partitions.get(slide or "") == word] for word in held_out
        }
        held_out = {word: (len(found), sum(found)) for word, found in held.items()}
        if not kept:
            raise _only_held_out("tiles", folder, held_out)
        return kept, held_out

    def attention_folder(self, model: str) -> Path:
        """Folder of the attention maps of a model, unless another one is given."""
        return attention_folder(self.path, encoder_name(model))

    def tiled_slides(self, moved: str | None) -> TiledSlides:
        """Its slides.

        Args:
            moved: Folder or slides.csv of slides that were moved; None if they were not.

        Raises:
            DataError: If ``dino tile`` did not write the folder.
        """
        if self.tiling is None:
            raise DataError(
                f"expected {TILING_FILE}, which `dino tile` writes, in {self.path} to read tiles from slides, "
                "found none"
            )
        return TiledSlides(self.tiling.geometry, self.status, slide_paths(moved), self.tiling.reader)

    def unknown_partitions(self) -> list[str]:
        """Warnings about values of ``partition`` that are not known."""
        return unknown_values(row.partition for row in self.status.values() if row.status == OK)

    @property
    def partitions(self) -> dict[str, str]:
        """Partition of each slide; for a slide that failed or was excluded later, that word instead."""
        return {slide: row.partition if row.status == OK else row.status for slide, row in self.status.items()}

    def geometry(self) -> dict[str, Any]:
        """Spacing (µm/px) and size (px) of the tiles, None where not recorded."""
        known = self.tiling.geometry if self.tiling else None
        return {
            "spacing_um": known.spacing_um if known else None,
            "tile_size_px": known.tile_size_px if known else None,
        }

    @property
    def patients(self) -> dict[str, str]:
        """Patient of each slide, where recorded."""
        return {slide: row.patient_id for slide, row in self.status.items() if row.patient_id}

    def grids(self, region_cells: int | None = None) -> tuple[Path, list[GridEntry], HeldOut]:
        """The folder of the feature grids, the grids in it without those of held-out slides, and counts of the latter.

        Args:
            region_cells: Tiles along a side of the regions that are cut from features of tiles; None to cut none, and
                list all such files.

        Raises:
            DataError: If there are no grids that may be trained on.
        """
        folder = self.grid_folder
        if not any(folder.glob("*.pt")) and any(folder.glob("*.h5")):
            return folder, *_cut_entries(folder, region_cells, self.partitions)
        return folder, *_grid_entries(self.path, folder, self.regions(), self.partitions)

    def regions(self) -> list[RegionRecord]:
        """The regions that are recorded."""
        return read_regions(self.path) if (self.path / REGIONS_TABLE).exists() else []

    def features_of_cells(
        self, regions: Sequence[RegionRecord], expected: GridSource | None, user: str
    ) -> dict[tuple[int, int], np.ndarray]:
        """Level-1 features of the cells of regions of one slide, ``(D,)`` by row and column of the lattice.

        Args:
            regions: The regions.
            expected: The model that they should be of; None if it is not known.
            user: The level-2 model that reads them, for messages.

        Raises:
            DataError: If a grid is missing, damaged, or of another model.
        """
        folder = self.grids_of(expected, user)
        found: dict[tuple[int, int], np.ndarray] = {}
        for one in regions:
            grid = read_grid(grid_path(folder, one), "yx", one.grid).numpy()  # (D, h, w)
            row, column = one.y // one.step_lv0, one.x // one.step_lv0
            found |= {(row + i, column + j): grid[:, i, j] for i, j in np.ndindex(*one.grid)}
        return found

    def grids_of(self, expected: GridSource | None, user: str) -> Path:
        """The folder of the grids that a level-2 model reads; the arguments are those of :meth:`features_of_cells`.

        Raises:
            DataError: If they are of another model, or it is not known which of several.
        """
        folder = find_grids(self.path, self.encoder, expected) or self.grid_folder
        check_same_source(expected, grid_source(folder), user, str(folder))
        return folder

    def tile_spacings(self) -> dict[str, float]:
        """Actual spacing of the tiles of each slide, where recorded."""
        return read_tile_spacings(self.path) if tile_table(self.path).exists() else {}

    def slide_infos(self, spacings: Mapping[str, float]) -> dict[str, SlideInfo]:
        """What is recorded of each slide, with the actual spacing of its samples."""
        infos = {}
        for slide in {*self.status, *spacings}:
            row, spacing = self.status.get(slide), spacings.get(slide)
            infos[slide] = SlideInfo(
                patient_id=(row.patient_id or None) if row else None,
                centre=(row.centre or None) if row else None,
                spacing_um=spacing if spacing is not None and isfinite(spacing) else None,
            )
        return infos


def check_held_out(roots: Sequence[Root]) -> None:
    """Raise DataError if the file of a held-out slide, or a copy of it, is also one of a slide that is trained on.

    Slides whose files are not there are not compared; those of object stores are compared by their addresses.

    Args:
        roots: The data folders.
    """
    by_file: dict[Any, list[SlideStatus]] = {}
    for row in (row for root in roots for row in root.status.values() if row.status == OK):
        path = row.image_path
        if not isinstance(path, Path):
            by_file.setdefault(path, []).append(row)
        elif path.is_file():
            by_file.setdefault(Path(os.path.realpath(path)), []).append(row)
    for same in by_file.values():
        _check_partitions(same)
    local = {path: rows for path, rows in by_file.items() if isinstance(path, Path)}
    files = list(local.values())
    for first, second in find_copies(list(local)):
        _check_partitions([*files[first], *files[second]])


def _check_partitions(rows: Sequence[SlideStatus]) -> None:
    """Raise DataError if of some slides that are one file, some are held out and some are trained on."""
    held_out = next((row for row in rows if row.partition not in PRETRAIN), None)
    trained = next((row for row in rows if row.partition in PRETRAIN), None)
    if held_out is not None and trained is not None:
        raise DataError(
            f"expected held-out slides that are not trained on under another name or in another folder, found the file "
            f"of {held_out.slide_id} (partition '{held_out.partition}'), {held_out.image_path}, also as "
            f"{trained.slide_id}, which is trained on; give both the same partition, or remove one from the "
            "slide list, and run `dino tile` again"
        )


def slides_of(slide_ids: set[str], status: Mapping[str, SlideStatus]) -> dict[str, list[str]]:
    """Slides, and their patients as far as they are recorded."""
    patients = {status[slide].patient_id for slide in slide_ids if slide in status}
    return {"slide_ids": sorted(slide_ids), "patient_ids": sorted(patient for patient in patients if patient)}


def data_folders(config: Mapping[str, Any]) -> list[Path]:
    """The data folders of a run that exist, from its settings."""
    named = [config.get("data_dir"), *(config.get("more_data_dirs") or [])]
    return [Path(folder) for folder in named if folder and Path(folder).is_dir()]


def tile_folder(root: Root) -> Path:
    """The folder whose images are the tiles.

    Raises:
        DataError: If ``dino tile`` wrote the folder, but there are no JPEG files in it.
    """
    tiles = root.path / TILES_FOLDER / "imgs"
    if tiles.is_dir():
        return tiles
    if root.tiling is not None:  # other images under this folder are previews, not tiles
        stored = root.tiling.storage == "jpeg"
        again = "tile the same slides again to cut what is missing" if stored else "tile them with storage=jpeg"
        raise DataError(
            f"expected tiles in {tiles}, found none (storage={root.tiling.storage}); read them from the slides "
            f"(source=slides), or {again}{'' if stored else ' into another ROOT'}"
        )
    if (root.path / COORDINATES_FOLDER).is_dir():
        raise DataError(
            f"expected {TILING_FILE} and {TILES_FOLDER}/imgs in {root.path}, which has other files of `dino tile`, "
            "found neither; copy them too, or tile the same slides again"
        )
    return root.path / "imgs" if (root.path / "imgs").is_dir() else root.path


def _grid_entries(
    root: Path, folder: Path, regions: Sequence[RegionRecord], partitions: Mapping[str, str]
) -> tuple[list[GridEntry], HeldOut]:
    """Grid files of a folder in order, with slide, shape and tissue where they are recorded, and held-out counts.

    Args:
        root: The data folder, for messages.
        folder: Where the grids are.
        regions: What is recorded of them.
        partitions: Partition of each slide.

    Raises:
        DataError: If there is no ``.pt`` file that may be trained on.
    """
    known = {record.path.name: record for record in regions}
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        raise DataError(f"expected feature grids (*.pt) in {folder}, found none; run `dino extract MODEL {root}` first")

    def slide(path: Path) -> str | None:
        return known[path.name].slide_id if path.name in known else slide_of(path)

    entries = []
    kept, held_out = split_files(paths, slide, partitions)
    for path in kept:
        region = known.get(path.name)
        entries.append(GridEntry(path, region.slide_id, region.grid, region.tissue) if region else GridEntry(path))
    if not entries:
        raise _only_held_out("grids", folder, held_out)
    return entries, held_out


def _cut_entries(folder: Path, cells: int | None, partitions: Mapping[str, str]) -> tuple[list[GridEntry], HeldOut]:
    """Files of features of tiles that have regions of which every tile is there; how many tiles are in none is said.

    Args:
        folder: Where the files are.
        cells: Tiles along a side of a region; None for all files.
        partitions: Partition of each slide.

    Raises:
        DataError: If there are no such regions of slides that may be trained on, or a file cannot be used.
    """
    from dino.data.region_grids import open_regions  # needs h5py

    kept, held_out = split_files(sorted(folder.glob("*.h5")), lambda path: path.stem, partitions)
    if not kept:
        raise _only_held_out("features", folder, held_out)
    if cells is None:
        return [GridEntry(path, path.stem) for path in kept], held_out
    if cells < SMALLEST_SIDE:
        raise ConfigError(f"expected region_cells of at least {SMALLEST_SIDE}, found {cells}")
    entries, tiles, regions = [], 0, 0
    for path in kept:  # one after another: coordinates of all tiles at once may take gigabytes
        opened = open_regions(path, cells)
        tiles, regions = tiles + len(opened.bag), regions + len(opened)
        if len(opened):
            entries.append(GridEntry(path, path.stem, (cells, cells)))
    found = f"{regions} with {regions * cells**2} of {tiles} tiles, in {len(entries)} of {len(kept)} slides"
    if not regions:
        raise DataError(
            f"expected regions of {cells} x {cells} tiles that are all in the features in {folder}, found {found}; "
            "set a smaller region_cells, or extract regions, whose cells without tissue have features too"
        )
    progress.say(f"{folder}: complete regions of {cells} x {cells} tiles: {found}; other tiles are left out")
    return entries, held_out


def _only_held_out(items: str, folder: Path, held_out: HeldOut) -> DataError:
    found = ", ".join(f"{slides} of partition '{word}'" for word, (slides, _) in held_out.items())
    return DataError(
        f"expected {items} of slides whose partition is blank or pretrain in {folder}, found only held-out slides "
        f"({found}); change partition in slides.csv and run `dino tile` again, which cuts nothing twice"
    )


def source_of_grids(folder: Path, expected: GridSource | None = None, user: str = "") -> GridSource | None:
    """The level-1 model of the grids in a folder; None, and a line that says so, where it is not recorded.

    Args:
        folder: The folder.
        expected: The model of the grids that a level-2 model was trained on; None if there is none, or not known.
        user: That level-2 model, for the message.

    Raises:
        DataError: If the grids are of another model than expected.
    """
    source = grid_source(folder)
    if source is None:
        progress.say(f"{folder}: no record of the model of these grids ({RECORD}); it is recorded as unknown")
    check_same_source(expected, source, user, str(folder))
    return source


def origin_of_grids(source: GridSource | None) -> dict[str, Any]:
    """What is recorded of feature grids in the identity and the checkpoints of a run, see ``Level.origin``."""
    return {KEY: recorded(source)}


def check_grids(paths: Sequence[Path], origin: Mapping[str, Any], model: str) -> None:
    """Check that feature grids are of one level-1 model, that whose grids a level-2 model was trained on.

    Args:
        paths: Their files.
        origin: What is recorded of the samples that the model was trained on, see ``Level.origin``.
        model: The level-2 model, for the message.

    Raises:
        DataError: If they are of another model, or of several.
    """
    expected = GridSource.from_dict(origin.get(KEY))
    for folder in sorted({path.parent for path in paths}):
        source = grid_source(folder)
        check_same_source(expected, source, model, str(folder))
        expected = expected or source


def check_level_1(folders: Iterable[Path], fingerprint: str, model: str) -> GridSource | None:
    """Check that feature grids are of the level-1 model that is shown beside a level-2 model, where that is recorded.

    Args:
        folders: Their folders.
        fingerprint: Of the level-1 model.
        model: That model, for the message.

    Returns:
        Their source; None where it is not recorded.

    Raises:
        DataError: If they are of another model.
    """
    found = None
    for folder in sorted(set(folders)):
        found = grid_source(folder)
        if found and found.fingerprint != fingerprint:
            raise DataError(
                f"expected feature grids of {model} in {folder}, found those of {found.name}; name that model, choose "
                f"other grids, or run `dino extract {model} ROOT encoder=NAME` first"
            )
    return found


def shapes_of_grids(paths: Sequence[Path]) -> dict[str, tuple[int, int]]:
    """``(h, w)`` of feature grids by file name, from a ``regions.csv`` beside or above them.

    Raises:
        DataError: If a table is damaged.
    """
    roots = {root for path in paths for root in (path.parent, path.parent.parent)}
    tables = [read_regions(root) for root in sorted(roots) if (root / REGIONS_TABLE).exists()]
    return {record.path.name: record.grid for table in tables for record in table}
