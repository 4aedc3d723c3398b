"""Level 2: slide files from feature grids: HDF5 files in the layout that CLAM and TRIDENT read."""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import files, progress
from dino.data.datasets import TILE_NAME
from dino.data.grids import open_grids, read_grid
from dino.errors import DataError
from dino.extraction.embed import Normalise, batches, identity, read_ahead
from dino.extraction.extractor import Extractor, ExtractSummary
from dino.extraction.folders import find_grids, grid_path
from dino.extraction.record import (
    RECORD,
    check_folder,
    grid_source,
    model_record,
    prepare_folders,
    read_record,
    write_record,
)
from dino.extraction.tile_files import coordinate_attributes
from dino.models.grid_source import check_same_source
from dino.slides.tables import (
    REGIONS_FOLDER,
    REGIONS_TABLE,
    STATUS_TABLE,
    TILING_FILE,
    RegionRecord,
    SlideStatus,
    read_regions,
    read_status,
    read_tiling,
)

FOLDER = "slide_features"
FEATURES, EMBEDDING, MEAN = "features", "slide_embedding", "mean of features"  # of regions
UNKNOWN = -1  # coordinates of a region whose position is not recorded


@dataclass(frozen=True)
class GridFile:
    """One region's features.

    Attributes:
        path: The ``.pt``.
        region: Index of the region in the file.
        shape: ``(h, w)``, None for a square grid.
        coords: Level-0 ``(x, y)``.
    """

    path: Path
    region: int = 0
    shape: tuple[int, int] | None = None
    coords: tuple[int, int] = (UNKNOWN, UNKNOWN)


@dataclass(frozen=True)
class SlideGrids:
    """The regions of one slide.

    Attributes:
        slide_id: Name of the slide.
        grids: Its regions.
        attributes: Attributes of the coordinates in the slide file.
    """

    slide_id: str
    grids: list[GridFile]
    attributes: dict[str, Any] = field(default_factory=dict)


def slides_of_tables(
    folder: Path,
    records: Sequence[RegionRecord],
    status: Mapping[str, SlideStatus],
    tile_size_px: int,
    spacing_um: float,
) -> list[SlideGrids]:
    """The slides of a ROOT that ``dino tile`` wrote.

    Args:
        folder: The folder of their grids.
        records: Its regions.
        status: Its slides.
        tile_size_px: Size of a cell.
        spacing_um: Requested spacing.
    """
    by_slide: dict[str, list[RegionRecord]] = defaultdict(list)
    for record in records:
        by_slide[record.slide_id].append(record)
    slides = []
    for slide_id, regions in by_slide.items():
        first, row = regions[0], status.get(slide_id)
        attributes = coordinate_attributes(first.step_lv0, first.grid, tile_size_px, spacing_um, row, first.spacing_um)
        grids = [GridFile(grid_path(folder, r), 0, r.grid, (r.x, r.y)) for r in regions]
        slides.append(SlideGrids(slide_id, grids, {"name": slide_id, **attributes}))
    return slides


def slides_of_folder(folder: Path) -> list[SlideGrids]:
    """The slides of a folder of ``.pt`` files with one region (``<slide>_<x>_<y>.pt``) or all regions of a slide each.

    Raises:
        DataError: If there are none, or two files have the same name.
    """
    paths = sorted(p for p in folder.rglob("*.pt") if not p.name.startswith("."))
    if not paths:
        raise DataError(f"expected feature grids (.pt) under {folder}, found none; extract them with a level-1 model")
    by_slide: dict[str, list[GridFile]] = defaultdict(list)
    names: dict[str, Path] = {}
    for path in paths:
        if names.setdefault(path.stem, path) != path:
            raise DataError(f"expected unique file names, found {names[path.stem]} and {path}; rename one")
        regions = open_grids(path).shape[0]
        match = TILE_NAME.fullmatch(path.stem)
        if match and regions == 1:
            by_slide[match["slide"]].append(GridFile(path, coords=(int(match["x"]), int(match["y"]))))
        else:
            by_slide[path.stem] += [GridFile(path, region) for region in range(regions)]
    return [SlideGrids(slide_id, grids, {"name": slide_id}) for slide_id, grids in sorted(by_slide.items())]


def write_slide(path: Path, slide: SlideGrids, values: Mapping[str, Tensor], model: Mapping[str, Any]) -> None:
    """Write features of a slide and ``coords`` (R, 2) of its regions atomically.

    Args:
        path: The ``.h5``; its folder must exist.
        slide: The slide.
        values: Float32 datasets by name: ``features`` (R, D) and the mean ``slide_embedding`` (D,), or one of them.
        model: Attributes that identify the model.
    """
    import h5py

    content = io.BytesIO()  # in memory first: HDF5 does not report a full disk as an OSError
    with h5py.File(content, "w") as file:
        for name, tensor in values.items():
            stored = file.create_dataset(name, data=tensor.numpy())
            stored.attrs.update({"name": slide.slide_id, **model} if name == FEATURES else {})
            stored.attrs.update({"made_of": MEAN} if tensor.ndim == 1 else {})
        coords = file.create_dataset("coords", data=np.array([g.coords for g in slide.grids], np.int64).reshape(-1, 2))
        coords.attrs.update(slide.attributes)
        file.attrs.update(model)
    files.write_bytes(path, content.getvalue(), make_folder=False)


def is_written(path: Path, slide: SlideGrids, shape: tuple[int, ...]) -> bool:
    """Whether ``path`` contains ``features`` of this shape for all regions of ``slide``."""
    import h5py

    if not path.is_file():
        return False
    expected = np.array([g.coords for g in slide.grids], np.int64).reshape(-1, 2)
    try:
        with h5py.File(path, "r") as file:
            return file[FEATURES].shape == shape and np.array_equal(file["coords"][:], expected)  # type: ignore[union-attr, index]
    except (OSError, KeyError, AttributeError):  # damaged: it is written again
        return False


def check_dim(grids: Sequence[GridFile], dim: int) -> None:
    """Check that all grids exist and have the dimension that the model takes.

    Raises:
        DataError: If a file is missing, is not a grid, or has features of another dimension.
    """
    absent = [g.path for g in grids if not g.path.is_file()]
    if absent:
        raise DataError(
            f"expected the features of every region, found {len(absent)} of {len(grids)} missing (the first is "
            f"{absent[0]}); run `dino extract` with the level-1 model first"
        )
    for path in dict.fromkeys(g.path for g in grids):
        found = open_grids(path).shape[-1]
        if found != dim:
            raise DataError(f"expected grids of D={dim}, which the model was trained on, found D={found} in {path}")


class SlideExtractor(Extractor):
    """Writes features of regions and slides with a level-2 model.

    Without a name ``ROOT/slide_features/<slide>.h5`` with both; with one ``ROOT/region_features_<encoder>/<slide>.h5``
    and ``ROOT/slide_features_<encoder>/<slide>.h5``.
    """

    title = "embed regions"
    plan: tuple[list[SlideGrids], int]  # slides without a file, and the number of slides with one

    def prepare(self) -> tuple[list[SlideGrids], int]:
        """See :class:`Extractor`."""
        root, expected = self.root, self.loaded.backbone.spec.input_dim
        grids = find_grids(root, self.config.grids, self.loaded.grids)
        level_1 = read_record((grids if grids and grids.name != REGIONS_FOLDER else root) / RECORD)
        slides, geometry = self._find(grids)
        first = next((g for s in slides for g in s.grids if g.path.is_file()), None)
        if first is not None:  # if all grids have another dimension, raise one error and not one per slide
            check_dim([first], expected)
        if level_1.get("embed_dim", expected) != expected:
            raise DataError(
                f"expected grids of D={expected}, which {self.loaded.source} was trained on, found "
                f"D={level_1['embed_dim']} of {level_1.get('model')} in {root}; extract with its level-1 model"
            )
        self._check_source(slides)
        record = {
            **model_record(self.loaded, self.config.precision, self.embed_dim),
            "geometry": geometry,
            "grids": {key: level_1.get(key) for key in ("fingerprint", "transform", "precision")} if level_1 else None,
            "grid_order": self.config.grid_order,
        }
        before = {folder: check_folder(folder / RECORD, record, folder, ".h5") for folder in self._folders()}
        if not self.config.dry_run:
            with files.oserror_to_data_error(root):  # here, so that every process receives the error
                for folder, earlier in before.items():
                    prepare_folders([folder], folder / RECORD)
                    write_record(folder / RECORD, record, earlier)
        missing = [slide for slide in slides if not self._is_written(slide)]
        return missing, len(slides) - len(missing)

    def slides(self) -> Sequence[SlideGrids]:
        """See :class:`Extractor`."""
        return self.plan[0]

    def size(self, slide: SlideGrids) -> int:
        """Number of regions."""
        return len(slide.grids)

    def example(self) -> Tensor | None:
        """See :class:`Extractor`."""
        return self._read(self.slides()[0].grids[0])[None] if self.slides() else None

    def normalise(self) -> Normalise:
        """See :class:`Extractor`."""
        return identity

    def process(self, slide: SlideGrids, advance: Callable[[int], None]) -> None:
        """See :class:`Extractor`."""
        loaded, config = self.loaded, self.config
        check_dim(slide.grids, loaded.backbone.spec.input_dim)
        grids = read_ahead(self._read, slide.grids, config.num_workers, config.batch_size)
        parts = []
        for part in self.embedder(batches(grids, config.batch_size)):
            parts.append(part)
            advance(len(part))
        encoder = config.encoder or loaded.backbone.spec.arch
        model = {"model": loaded.source, "encoder": encoder, "fingerprint": loaded.fingerprint}
        features = torch.cat(parts)
        mean = features.double().mean(0).float()
        for folder, values in zip(
            self._folders(),
            [{FEATURES: features}, {FEATURES: mean}] if config.encoder else [{FEATURES: features, EMBEDDING: mean}],
            strict=True,
        ):
            write_slide(folder / f"{slide.slide_id}.h5", slide, values, model)

    def summary(self, slides: Sequence[SlideGrids], **fields: Any) -> ExtractSummary:
        """See :class:`Extractor`."""
        regions = sum(len(slide.grids) for slide in slides)
        size = (regions + len(slides)) * self.embed_dim * 4 / 1e9
        written = len(slides) * len(self._folders())
        skipped = self.plan[1] * len(self._folders())
        return ExtractSummary(self._folders(), written, skipped, embedded=regions, gigabytes=size, **fields)

    def _folders(self) -> tuple[Path, ...]:
        """The folders that are written to: one, or with a name that of the regions and that of the slides."""
        name = self.config.encoder
        return (
            tuple(self.root / f"{kind}_features_{name}" for kind in ("region", "slide"))
            if name
            else (self.root / FOLDER,)
        )

    def _is_written(self, slide: SlideGrids) -> bool:
        shapes = (len(slide.grids), self.embed_dim), (self.embed_dim,)
        paths = (folder / f"{slide.slide_id}.h5" for folder in self._folders())
        return all(is_written(path, slide, shape) for path, shape in zip(paths, shapes, strict=False))

    def _read(self, grid: GridFile) -> Tensor:
        return read_grid(grid.path, self.config.grid_order, grid.shape, grid.region)

    def _check_source(self, slides: Sequence[SlideGrids]) -> None:
        """Check that the grids are of the level-1 model that this model was trained on; say so where it is unknown."""
        expected, source = self.loaded.grids, self.loaded.source
        found = {folder: grid_source(folder) for folder in sorted({g.path.parent for s in slides for g in s.grids})}
        for folder, one in found.items():
            check_same_source(expected, one, source, str(folder))
        if expected is None:
            progress.say(f"{source}: no record of the level-1 model whose grids it was trained on; it is not compared")
        elif None in found.values():
            progress.say(f"{self.root}: no record of the model of its grids ({RECORD}); it is not compared")

    def _find(self, folder: Path | None) -> tuple[list[SlideGrids], dict[str, Any] | None]:
        """All slides, and the geometry of their tiles if it is recorded.

        Args:
            folder: Folder of the grids; None if ROOT has none, which may be one itself.
        """
        root = self.root
        if not (root / REGIONS_TABLE).exists():
            folder = folder or root
            progress.say(f"{folder}: no {REGIONS_TABLE}; assuming square grids with row-major rows (see grid_order)")
            return slides_of_folder(folder), None
        records = read_regions(root)
        if not records:
            raise DataError(
                f"expected regions in {root / REGIONS_TABLE}, found none; tile with a smaller region_size_px"
            )
        status = read_status(root) if (root / STATUS_TABLE).exists() else {}
        if (root / TILING_FILE).exists():
            geometry = read_tiling(root).geometry
            tile_size, spacing = geometry.tile_size_px, geometry.spacing_um
        else:  # images of regions: the level-0 footprint of a cell is assumed to be its size
            tile_size, spacing = records[0].step_lv0, records[0].spacing_um

        return slides_of_tables(folder or root / REGIONS_FOLDER, records, status, tile_size, spacing), {
            "tile_size_px": tile_size,
            "spacing_um": spacing if math.isfinite(spacing) else None,
        }
