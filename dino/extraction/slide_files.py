"""Level 2 over feature grids: one HDF5 file per slide, laid out as CLAM and TRIDENT read them."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dino import files
from dino.data.datasets import TILE_NAME
from dino.data.grids import open_grids
from dino.errors import DataError
from dino.slides.tables import RegionRecord, SlideStatus

FOLDER = "slide_features"
OBJECTIVES = (1.25, 2, 4, 5, 10, 20, 40, 60, 80)
UNKNOWN = -1  # coordinates of a region of which only the features are known


@dataclass(frozen=True)
class GridFile:
    """One region's features.

    Attributes:
        path: The ``.pt``.
        region: Which region of the file.
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
        slide_id: Its name.
        grids: Its regions.
        about: Attributes of the coordinates, for readers.
    """

    slide_id: str
    grids: list[GridFile]
    about: dict[str, Any] = field(default_factory=dict)


def slides_of_tables(
    root: Path, records: Sequence[RegionRecord], status: Mapping[str, SlideStatus], tile_size_px: int, spacing_um: float
) -> list[SlideGrids]:
    """The slides of a ROOT that ``dino tile`` wrote.

    Args:
        root: ROOT.
        records: Its regions.
        status: Its slides.
        tile_size_px: Side of a cell.
        spacing_um: Requested spacing.
    """
    by_slide: dict[str, list[RegionRecord]] = defaultdict(list)
    for record in records:
        by_slide[record.slide_id].append(record)
    slides = []
    for slide_id, regions in by_slide.items():
        about = coordinate_attributes(regions[0], status.get(slide_id), tile_size_px, spacing_um)
        grids = [GridFile(root / r.path, 0, r.grid, (r.x, r.y)) for r in regions]
        slides.append(SlideGrids(slide_id, grids, {"name": slide_id, **about}))
    return slides


def slides_of_folder(folder: Path) -> list[SlideGrids]:
    """The slides of a bare folder of ``.pt`` files: one region each (``<slide>_<x>_<y>.pt``), or a slide's regions.

    Raises:
        DataError: If there are none, or two files claim the same slide and place.
    """
    paths = sorted(p for p in folder.rglob("*.pt") if not p.name.startswith("."))
    if not paths:
        raise DataError(f"expected feature grids (.pt) under {folder}, found none; a level-1 model makes them")
    by_slide: dict[str, list[GridFile]] = defaultdict(list)
    names: dict[str, Path] = {}
    for path in paths:
        if names.setdefault(path.stem, path) != path:
            raise DataError(f"expected names of their own, found {names[path.stem]} and {path}; rename one")
        regions = open_grids(path).shape[0]
        match = TILE_NAME.fullmatch(path.stem)
        if match and regions == 1:
            by_slide[match["slide"]].append(GridFile(path, coords=(int(match["x"]), int(match["y"]))))
        else:
            by_slide[path.stem] += [GridFile(path, region) for region in range(regions)]
    return [SlideGrids(slide_id, grids, {"name": slide_id}) for slide_id, grids in sorted(by_slide.items())]


def coordinate_attributes(
    region: RegionRecord, status: SlideStatus | None, tile_size_px: int, spacing_um: float
) -> dict[str, Any]:
    """What CLAM and TRIDENT keep beside coordinates: a "patch" of theirs is a region here.

    ``patch_size`` is its side at the requested spacing and ``patch_size_level0`` at level 0; magnifications are the
    objective nearest to 10 / spacing.
    """
    about: dict[str, Any] = {
        "patch_size": region.grid[1] * tile_size_px,
        "patch_size_level0": region.grid[1] * region.step_lv0,
        "patch_height": region.grid[0] * tile_size_px,
        "patch_height_level0": region.grid[0] * region.step_lv0,
    }
    if np.isfinite(spacing_um):
        about |= {"target_magnification": objective(spacing_um), "spacing_um": region.spacing_um}
    if status is not None:
        about |= {"level0_width": status.width, "level0_height": status.height, "slide_path": str(status.image_path)}
        if status.spacing_um:
            about |= {"level0_magnification": objective(status.spacing_um), "level0_spacing_um": status.spacing_um}
    return about


def objective(spacing_um: float) -> float:
    """Magnification of the objective nearest to a spacing: 0.25 µm/px is 40, 0.5 is 20."""
    nearest = min(OBJECTIVES, key=lambda power: abs(np.log(power * spacing_um / 10)))
    return int(nearest) if nearest == int(nearest) else nearest


def write_slide(path: Path, slide: SlideGrids, features: Tensor, model: Mapping[str, Any]) -> None:
    """Write ``features`` (R, D), ``coords`` (R, 2) and their mean ``slide_embedding`` (D,), whole or not at all.

    Args:
        path: The ``.h5``; its folder is there, unless the disk has vanished.
        slide: The slide.
        features: ``(R, D)`` float32.
        model: Attributes that say which model made them.
    """
    import h5py

    content = io.BytesIO()  # in memory first, because HDF5 reports a full disk in ways of its own
    with h5py.File(content, "w") as file:
        stored = file.create_dataset("features", data=features.numpy())
        stored.attrs.update({"name": slide.slide_id, **model})
        coords = file.create_dataset("coords", data=np.array([g.coords for g in slide.grids], np.int64).reshape(-1, 2))
        coords.attrs.update(slide.about)
        mean = file.create_dataset("slide_embedding", data=features.double().mean(0).float().numpy())
        mean.attrs["made_of"] = "mean of features"
        file.attrs.update(model)
    files.write_bytes(path, content.getvalue(), make_folder=False)


def is_written(path: Path, slide: SlideGrids, dim: int) -> bool:
    """Whether ``path`` holds the regions of ``slide``."""
    import h5py

    if not path.is_file():
        return False
    wanted = np.array([g.coords for g in slide.grids], np.int64).reshape(-1, 2)
    try:
        with h5py.File(path, "r") as file:
            return file["features"].shape == (len(wanted), dim) and np.array_equal(file["coords"][:], wanted)  # type: ignore[union-attr, index]
    except (OSError, KeyError, AttributeError):  # damaged: it is written again
        return False


def check_dim(grids: Sequence[GridFile], dim: int) -> None:
    """Refuse grids that the model was not made for.

    Raises:
        DataError: If a file is missing, is no grid, or has features of another width.
    """
    absent = [g.path for g in grids if not g.path.is_file()]
    if absent:
        raise DataError(
            f"expected the features of every region, found {len(absent)} of {len(grids)} missing (the first is "
            f"{absent[0]}); run `dino extract` with the level-1 model to its end first"
        )
    for path in dict.fromkeys(g.path for g in grids):
        found = open_grids(path).shape[-1]
        if found != dim:
            raise DataError(f"expected grids of D={dim}, which the model was trained on, found D={found} in {path}")
