"""Annotated areas of a slide: which of its tiles lie in a region of interest, and the class of each tile."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError
from dino.files import printable
from dino.slides.annotation_files import AnnotationFile, Outline, read_annotation_file

LEAF_TILES = 16  # so many tiles are intersected with a polygon at once
REPAIRED = 1e-6  # relative change of its area up to which an invalid polygon counts as repaired
MAX_SPACING_DIFFERENCE = 0.1  # between a slide and the spacing that its annotation file states


@dataclass(frozen=True, eq=False)
class Annotations:
    """The annotated areas of one slide.

    Attributes:
        areas: Area of each class as a shapely geometry in level-0 px; overlapping polygons count once.
        outlines: The polygons, for drawing.
        ignored: Number of objects of the file that have no area.
    """

    areas: Mapping[str, Any]
    outlines: Sequence[Outline]
    ignored: int = 0

    def classes(self, origins: np.ndarray, side: int) -> tuple[list[str], np.ndarray]:
        """The class with the largest share of each square; of equal shares, that of the smallest area on the slide.

        Args:
            origins: ``(N, 2)`` int64 level-0 ``(x, y)``.
            side: Side of the squares in level-0 px.

        Returns:
            The classes, empty where nothing is annotated, and their shares ``(N,)`` float64.
        """
        names = sorted(self.areas, key=lambda name: (self.areas[name].area, name))
        shares = np.stack([np.zeros(len(origins)), *(area_fractions(self.areas[n], origins, side) for n in names)])
        # Shares that differ by rounding only are equal; argmax takes the first of equal ones.
        chosen = np.round(shares, 6).argmax(axis=0)  # (N,), 0 for none
        return [["", *names][index] for index in chosen], shares[chosen, np.arange(len(origins))]

    def inside(self, origins: np.ndarray, side: int, config: TileConfig) -> np.ndarray:
        """Fraction of each square that lies in the region of interest: in an included class and in no excluded one.

        Args:
            origins: ``(N, 2)`` int64 level-0 ``(x, y)``.
            side: Side of the squares in level-0 px.
            config: The settings ``roi_include`` (empty: the whole slide) and ``roi_exclude``.

        Returns:
            ``(N,)`` float64 in [0, 1].
        """
        excluded = self._union(config.roi_exclude)
        if not config.roi_include:
            return 1 - area_fractions(excluded, origins, side)
        return area_fractions(self._union(config.roi_include).difference(excluded), origins, side)

    def _union(self, patterns: Sequence[str]) -> Any:
        import shapely

        return shapely.union_all([self.areas[name] for name in self.areas if _matches(name, patterns)])


def check_roi_settings(config: TileConfig) -> None:
    """Raise a ConfigError if a setting of the regions of interest is out of range."""
    for name in ("roi_include", "roi_exclude"):
        if not all(getattr(config, name)):
            raise ConfigError(f"expected {name} to be names of classes, found an empty one")
    if not 0 < config.min_roi <= 1:
        raise ConfigError(f"expected min_roi to be a fraction above 0, at most 1, found {config.min_roi}")


def has_roi(config: TileConfig) -> bool:
    """Whether the settings restrict what is tiled."""
    return bool(config.roi_include or config.roi_exclude)


def unmatched(paths: Iterable[Path], config: TileConfig) -> str:
    """A warning about names in ``roi_include`` and ``roi_exclude`` that are no class of any file, else an empty text.

    Files are read until each name has been found; those that cannot be read are reported when their slide is tiled.

    Args:
        paths: Annotation files.
        config: The settings.
    """
    missing = [*config.roi_include, *config.roi_exclude]
    known: set[str] = set()
    for path in paths:
        if not missing:
            break
        try:
            found = {outline.name for outline in read_annotation_file(path).outlines}
        except DataError:
            continue
        known |= found
        missing = [pattern for pattern in missing if not any(_matches(name, [pattern]) for name in found)]
    if not missing:
        return ""
    return (
        f"no annotation has a class {' or '.join(map(repr, missing))} of roi_include and roi_exclude; the classes are "
        f"{', '.join(sorted(known)) or 'none'}"
    )


def read_annotations(path: Path, slide_size: tuple[int, int], spacing_um: float) -> Annotations:
    """Read and check the annotations of a slide.

    Args:
        path: The file, as :func:`~dino.slides.annotation_files.read_annotation_file` reads it.
        slide_size: ``(width, height)`` in level-0 px.
        spacing_um: Spacing of level 0 in µm per px.

    Raises:
        DataError: If it cannot be read, is not in level-0 px of this slide, or has polygons without a definite area.
    """
    import shapely

    found = read_annotation_file(path)
    _check_units(found, path, slide_size, spacing_um)
    polygons: dict[str, list[Any]] = {}
    cut_out: dict[str, list[Any]] = {}
    drawn = []
    for number, outline in enumerate(found.outlines, 1):
        polygon = _polygon(outline, f"{printable(path)}: polygon {number} (class '{printable(outline.name)}')")
        if polygon.area > 0:
            drawn.append(outline)
            (cut_out if outline.negative else polygons).setdefault(outline.name, []).append(polygon)
    areas = {name: shapely.union_all(parts) for name, parts in polygons.items()}
    areas |= {
        name: areas[name].difference(shapely.union_all(parts)) for name, parts in cut_out.items() if name in areas
    }
    return Annotations(areas, drawn, found.ignored + len(found.outlines) - len(drawn))


def area_fractions(area: Any, origins: np.ndarray, side: int) -> np.ndarray:
    """Fraction of each square that a shapely geometry covers, exactly.

    The squares are halved along the longer axis of their bounding box, and the geometry is clipped to each half: a
    polygon of many vertices is not intersected with every tile of a slide.

    Args:
        area: The geometry, in level-0 px.
        origins: ``(N, 2)`` int64 level-0 ``(x, y)``.
        side: Side of the squares in level-0 px.

    Returns:
        ``(N,)`` float64 in [0, 1].
    """
    fractions = np.zeros(len(origins))
    if len(origins):
        _fill(fractions, np.arange(len(origins)), area, origins.astype(np.float64), side)
    return fractions


def _fill(fractions: np.ndarray, chosen: np.ndarray, area: Any, origins: np.ndarray, side: int) -> None:
    """Write the fractions of the ``chosen`` squares."""
    import shapely

    places = origins[chosen]  # (n, 2)
    low, high = places.min(axis=0), places.max(axis=0)
    box = shapely.box(*low, *(high + side))
    inside = shapely.intersection(area, box)
    if inside.is_empty:
        return
    if shapely.covers(inside, box):
        fractions[chosen] = 1.0
        return
    if len(chosen) <= LEAF_TILES or (low == high).all():
        squares = shapely.box(places[:, 0], places[:, 1], places[:, 0] + side, places[:, 1] + side)
        fractions[chosen] = np.minimum(shapely.area(shapely.intersection(inside, squares)) / side**2, 1.0)
        return
    along = places[:, int(np.argmax(high - low))]
    first = along < (along.min() + along.max()) / 2
    _fill(fractions, chosen[first], inside, origins, side)
    _fill(fractions, chosen[~first], inside, origins, side)


def _polygon(outline: Outline, where: str) -> Any:
    """A valid shapely geometry.

    Raises:
        DataError: If the polygon crosses itself such that its area is not definite.
    """
    import shapely

    polygon = shapely.Polygon(outline.rings[0], outline.rings[1:])
    if polygon.is_valid:
        return polygon
    repaired = shapely.make_valid(polygon)
    # Where a ring only touches itself, repairing changes no area; a ring that crosses itself has no definite one.
    if abs(repaired.area - polygon.area) <= REPAIRED * polygon.area:
        return repaired
    raise DataError(
        f"{where}: expected a polygon that does not cross itself, found {shapely.is_valid_reason(polygon)}; correct or "
        "delete it in the program that drew it"
    )


def _check_units(found: AnnotationFile, path: Path, slide_size: tuple[int, int], spacing_um: float) -> None:
    """Raise a DataError unless the polygons can be level-0 px of the slide."""
    stated = found.spacing_um
    if stated is not None and abs(stated - spacing_um) > MAX_SPACING_DIFFERENCE * spacing_um:
        raise DataError(
            f"expected annotations of a slide with {spacing_um:g} µm/px, found {stated:g} in {printable(path)}; is it "
            "of another slide?"
        )
    size = np.array(slide_size)
    corners = [(outline.rings[0].min(axis=0), outline.rings[0].max(axis=0)) for outline in found.outlines]
    if corners and max(high.max() for _, high in corners) <= 1 < size.max():
        raise DataError(f"expected coordinates in level-0 px, found only numbers up to 1 in {printable(path)}")
    for outline, (low, high) in zip(found.outlines, corners, strict=True):
        clipped = np.clip(np.minimum(high, size) - np.maximum(low, 0), 0, None)
        if clipped.prod() < (high - low).prod() / 2:  # half of its bounding box is outside
            raise DataError(
                f"expected coordinates in level-0 px of the slide ({size[0]} x {size[1]} px), found a polygon of class "
                f"'{printable(outline.name)}' from {_place(low)} to {_place(high)} in {printable(path)}; is the file "
                "of another slide, another level, or in µm?"
            )


def _place(corner: np.ndarray) -> str:
    return f"({corner[0]:.0f}, {corner[1]:.0f})"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
