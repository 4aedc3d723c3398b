"""Reads the polygons of annotation files: QuPath's GeoJSON, and the XML of ASAP and of Aperio ImageScope.

The libraries that read the XML formats (hs2p's extra ``asap``) need NumPy 1, so both are parsed here, without entities.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from dino.errors import DataError
from dino.files import parse_json, printable

UNCLASSIFIED = "unclassified"
POLYGONS = {"Polygon", "MultiPolygon"}
OTHERS = {"Point", "MultiPoint", "LineString", "MultiLineString"}
NOT_ANNOTATIONS = {"cell", "tile"}  # QuPath's objects that annotate no area
ASAP_AREAS = {"Polygon", "Spline", "Rectangle"}  # a spline by its control points
APERIO_AREAS = {"", "0", "1", "2"}  # freehand, rectangle, ellipse; the others are arrows and rulers
APERIO_ELLIPSE = "2"
ELLIPSE_POINTS = 256


@dataclass(frozen=True, eq=False)
class Outline:
    """One polygon.

    Attributes:
        name: Its class.
        rings: Float64 ``(n, 2)`` level-0 ``(x, y)``: the outer ring, then holes.
        negative: Whether it is cut out of the other polygons of its class.
    """

    name: str
    rings: list[np.ndarray]
    negative: bool = False


@dataclass(eq=False)
class AnnotationFile:
    """Content of an annotation file.

    Attributes:
        outlines: Its polygons.
        ignored: Number of points, lines, cells and tiles, which have no area or annotate none.
        spacing_um: Spacing of level 0 in µm per px that the file states, if any.
    """

    outlines: list[Outline] = field(default_factory=list)
    ignored: int = 0
    spacing_um: float | None = None


def read_annotation_file(path: Path) -> AnnotationFile:
    """Read ``.geojson`` or ``.json`` (QuPath) or ``.xml`` (ASAP or Aperio ImageScope).

    Raises:
        DataError: If it is none of these, is damaged, or has coordinates that are not numbers.
    """
    reader = {".geojson": _read_geojson, ".json": _read_geojson, ".xml": _read_xml}.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"expected annotations as .geojson (QuPath) or .xml (ASAP, Aperio ImageScope), found {printable(path)}"
        )
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"expected annotations at {printable(path)}, could not read them: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError) as error:
        raise DataError(
            f"expected annotations as QuPath, ASAP or Aperio ImageScope write them, found {printable(path)}: "
            f"{printable(error)}"
        ) from None


def _ring(points: Iterable[Any], name: str) -> np.ndarray:
    """A ring as float64 ``(n, 2)``.

    Raises:
        ValueError: If it has less than three points, or a coordinate that is not a number.
    """
    ring = np.array([(float(x), float(y)) for x, y, *_ in points], np.float64).reshape(-1, 2)
    if not np.isfinite(ring).all():
        raise ValueError(f"a polygon of class '{name}' with coordinates that are not finite")
    if len(np.unique(ring, axis=0)) < 3:
        raise ValueError(f"a polygon of class '{name}' with less than three points")
    return ring


# -------------------------------------------------------------------------------------------------- GeoJSON


def _read_geojson(path: Path) -> AnnotationFile:
    content = parse_json(path.read_text(encoding="utf-8-sig"))
    found = AnnotationFile()
    for feature in _features(content):
        properties = feature.get("properties") or {}
        if properties.get("objectType") in NOT_ANNOTATIONS:
            found.ignored += 1
            continue
        name = _class_of(properties.get("classification"))
        _add_geometry(found, feature["geometry"], name)
    return found


def _features(content: Any) -> Iterator[Mapping[str, Any]]:
    """The features of a FeatureCollection, a list of features (earlier versions of QuPath), or a single one."""
    if isinstance(content, Mapping) and content.get("crs"):
        raise ValueError("a coordinate reference system (`crs`), expected level-0 pixels of the slide")
    if isinstance(content, Mapping) and content.get("type") == "FeatureCollection":
        content = content["features"]
    for feature in content if isinstance(content, list) else [content]:
        if not isinstance(feature, Mapping) or feature.get("type") != "Feature":
            raise ValueError("no list of GeoJSON features")
        yield feature


def _class_of(classification: Any) -> str:
    """QuPath's class: a name, ``{"name": …}``, or ``{"names": […]}`` of a derived class, printed as ``A: B``."""
    if isinstance(classification, Mapping):
        names = classification.get("names")
        classification = ": ".join(map(str, names)) if names else classification.get("name")
    return " ".join(str(classification or UNCLASSIFIED).split())


def _add_geometry(found: AnnotationFile, geometry: Mapping[str, Any], name: str) -> None:
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            _add_geometry(found, part, name)
    elif kind in POLYGONS:
        polygons = geometry["coordinates"] if kind == "MultiPolygon" else [geometry["coordinates"]]
        found.outlines += [Outline(name, [_ring(ring, name) for ring in rings]) for rings in polygons if rings]
    elif kind in OTHERS:
        found.ignored += 1
    else:
        raise ValueError(f"an unknown geometry '{kind}'")


# ------------------------------------------------------------------------------------------------------ XML


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses document type declarations, which neither program writes: they declare entities of any size."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("a document type declaration")


def _read_xml(path: Path) -> AnnotationFile:
    with path.open("rb") as file:
        root = ElementTree.parse(file, ElementTree.XMLParser(target=_WithoutDoctype())).getroot()
    readers: dict[str, Callable[[ElementTree.Element], AnnotationFile]]
    readers = {"ASAP_Annotations": _read_asap, "Annotations": _read_aperio}
    if root.tag not in readers:
        raise ValueError(f"the root element <{root.tag}>")
    return readers[root.tag](root)


def _read_asap(root: ElementTree.Element) -> AnnotationFile:
    found = AnnotationFile()
    for annotation in root.iter("Annotation"):
        group = annotation.get("PartOfGroup", "").strip()
        name = UNCLASSIFIED if group in ("", "None") else group
        if annotation.get("Type") not in ASAP_AREAS:
            found.ignored += 1
            continue
        points = sorted(annotation.iter("Coordinate"), key=lambda point: float(point.get("Order", "0")))
        found.outlines.append(Outline(name, [_ring(((p.attrib["X"], p.attrib["Y"]) for p in points), name)]))
    return found


def _read_aperio(root: ElementTree.Element) -> AnnotationFile:
    stated = root.get("MicronsPerPixel")
    found = AnnotationFile(spacing_um=float(stated) if stated and float(stated) > 0 else None)
    for layer in root.iter("Annotation"):
        name = _aperio_class(layer)
        for region in layer.iter("Region"):
            kind = region.get("Type", "")
            if kind not in APERIO_AREAS:
                found.ignored += 1
                continue
            points = [(point.attrib["X"], point.attrib["Y"]) for point in region.iter("Vertex")]
            ring = _ellipse(points) if kind == APERIO_ELLIPSE else _ring(points, name)
            found.outlines.append(Outline(name, [ring], region.get("NegativeROA") == "1"))
    return found


def _aperio_class(layer: ElementTree.Element) -> str:
    """Name of a layer, else its description, else ``layer <id>``."""
    descriptions = (a.get("Value", "") for a in layer.iter("Attribute") if a.get("Name") == "Description")
    names = (layer.get("Name", ""), *descriptions, f"layer {layer.get('Id', '')}")
    return next(text for text in (" ".join(name.split()) for name in names) if text)


def _ellipse(corners: Iterable[tuple[str, str]]) -> np.ndarray:
    """The ellipse in a bounding box, which is how ImageScope stores it."""
    box = np.array([(float(x), float(y)) for x, y in corners], np.float64).reshape(-1, 2)
    if not len(box) or not np.isfinite(box).all():
        raise ValueError("an ellipse without a bounding box")
    angles = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)
    low, high = box.min(axis=0), box.max(axis=0)
    return (low + high) / 2 + np.stack([np.cos(angles), np.sin(angles)], axis=1) * (high - low) / 2
