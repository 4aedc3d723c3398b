"""Annotated areas: fractions against a supersampled mask, the formats, and files that cannot be meant."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError
from dino.slides.annotations import Annotations, check_roi_settings, read_annotations, unmatched

SIZE, SIDE = (1000, 800), 100
ORIGINS = np.array([(x, y) for y in range(0, 701, SIDE) for x in range(0, 901, SIDE)])  # (80, 2)
SQUARE = [[100, 100], [350, 100], [350, 300], [100, 300], [100, 100]]
HOLE = [[150, 150], [200, 150], [200, 200], [150, 200], [150, 150]]
BOW_TIE = [[100, 100], [300, 300], [300, 100], [100, 300], [100, 100]]
PINCHED = [[100, 100], [300, 100], [200, 200], [300, 300], [100, 300], [200, 200], [100, 100]]  # touches itself


def feature(geometry: str, coordinates: Any, name: str | None = "tumour", **properties: Any) -> dict[str, Any]:
    classification = {"classification": {"name": name, "color": [200, 0, 0]}} if name else {}
    return {
        "type": "Feature",
        "geometry": {"type": geometry, "coordinates": coordinates},
        "properties": {"objectType": "annotation", **classification, **properties},
    }


def write(path: Path, *features: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def read(path: Path) -> Annotations:
    return read_annotations(path, SIZE, 0.5)


def inside_mask(rings: list[np.ndarray], factor: int = 4) -> np.ndarray:
    """Even-odd mask of the slide at ``factor`` samples per px: an independent rasterisation, by crossing numbers."""
    xs, ys = (np.arange(size * factor) / factor + 0.5 / factor for size in SIZE)
    crossings = np.zeros((len(ys), len(xs)), np.int64)
    for ring in rings:
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            rows = (y1 > ys) != (y2 > ys)
            if rows.any():
                at = x1 + (ys[rows] - y1) / (y2 - y1) * (x2 - x1)
                crossings[rows] += xs[None, :] < at[:, None]
    return crossings % 2 == 1


def supersampled(mask: np.ndarray, factor: int = 4) -> np.ndarray:
    """Fraction of each tile."""
    side = SIDE * factor
    return np.array([mask[y * factor :, x * factor :][:side, :side].mean() for x, y in ORIGINS])


def blob(rng: np.random.Generator, centre: tuple[int, int], radius: float) -> np.ndarray:
    """A star-shaped polygon with many corners."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 200))
    radii = radius * (0.7 + 0.3 * np.sin(5 * angles) + rng.uniform(-0.03, 0.03, 200))
    return np.stack([centre[0] + radii * np.cos(angles), centre[1] + radii * np.sin(angles)], axis=1)


def closed(ring: np.ndarray) -> list[list[float]]:
    return np.vstack([ring, ring[:1]]).tolist()


def test_fractions_are_those_of_a_supersampled_mask(tmp_path: Path) -> None:
    """Concave polygons of several parts, a hole, and two that overlap and count once."""
    rng = np.random.default_rng(0)
    large, hole, other = blob(rng, (400, 400), 320), blob(rng, (400, 400), 90), blob(rng, (800, 600), 150)
    over = np.array([(300, 300), (700, 300), (700, 500), (300, 500)], float)
    path = write(
        tmp_path / "a.geojson",
        feature("MultiPolygon", [[closed(large), closed(hole)], [closed(other)]], "tumour"),
        feature("Polygon", [closed(over)], "tumour"),
        feature("Polygon", [closed(over)], "artefact"),
    )
    found = read(path)
    covered, excluded = inside_mask([large, hole]) | inside_mask([other]) | inside_mask([over]), inside_mask([over])
    for config, mask in (
        (TileConfig(roi_include=["tumour"]), covered),
        (TileConfig(roi_include=["tum*"], roi_exclude=["artefact"]), covered & ~excluded),
        (TileConfig(roi_exclude=["artefact"]), ~excluded),
    ):
        np.testing.assert_allclose(found.inside(ORIGINS, SIDE, config), supersampled(mask), atol=2e-3)


def test_fractions_do_not_depend_on_which_tiles_are_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    found = read(write(tmp_path / "a.geojson", feature("Polygon", [closed(blob(rng, (500, 400), 350))])))
    config = TileConfig(roi_include=["tumour"])
    together = found.inside(ORIGINS, SIDE, config)
    order = rng.permutation(len(ORIGINS))
    np.testing.assert_allclose(found.inside(ORIGINS[order], SIDE, config), together[order], atol=1e-12)
    alone = [found.inside(ORIGINS[i : i + 1], SIDE, config)[0] for i in range(len(ORIGINS))]
    np.testing.assert_allclose(alone, together, atol=1e-12)
    assert 0 < together.mean() < 1 and found.inside(ORIGINS[:0], SIDE, config).shape == (0,)


def test_the_class_of_a_tile_has_the_largest_share(tmp_path: Path) -> None:
    """Of equal shares, the class with the smaller area on the slide: tumour drawn inside of tissue."""
    tissue = [[0, 0], [600, 0], [600, 400], [0, 400], [0, 0]]
    stroma = [[310, 100], [400, 100], [400, 200], [310, 200], [310, 100]]
    found = read(
        write(
            tmp_path / "a.geojson",
            feature("Polygon", [tissue], "tissue"),
            feature("Polygon", [SQUARE], "tumour"),
            feature("Polygon", [stroma], "stroma"),
        )
    )
    names, shares = found.classes(np.array([(100, 100), (300, 300), (700, 700), (550, 0)]), SIDE)
    assert names == ["tumour", "tissue", "", "tissue"]
    np.testing.assert_allclose(shares, [1, 1, 0, 0.5])


def test_other_forms_of_geojson(tmp_path: Path) -> None:
    """Lists of features, single ones, collections of geometries, derived and missing classes; points are counted."""
    point, line = feature("Point", [5, 5]), feature("LineString", [[0, 0], [9, 9]])
    collection = feature("GeometryCollection", None, None)
    collection["geometry"] = {
        "type": "GeometryCollection",
        "geometries": [{"type": "Polygon", "coordinates": [SQUARE]}],
    }
    derived = feature("Polygon", [SQUARE], None, classification={"names": ["Tumor", "Positive"]})
    cell = feature("Polygon", [SQUARE], "cell", objectType="cell")
    flat = feature("Polygon", [[[10, 10], [20, 10], [30, 10], [10, 10]]], "flat")
    path = tmp_path / "a.json"
    path.write_text(json.dumps([point, line, collection, derived, cell, flat]))
    found = read(path)
    assert {name: area.area for name, area in found.areas.items()} == {"unclassified": 50000, "Tumor: Positive": 50000}
    assert found.ignored == 4
    path.write_text(json.dumps(feature("Polygon", [SQUARE, HOLE])))
    assert read(path).areas["tumour"].area == 50000 - 2500
    path.write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    assert read(path).classes(ORIGINS[:1], SIDE)[0] == [""]


def test_a_ring_that_touches_itself_has_an_area(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.geojson", feature("Polygon", [PINCHED]))).areas["tumour"].area == 20000


ASAP = """<?xml version="1.0"?>
<ASAP_Annotations><Annotations>
<Annotation Name="a" Type="Polygon" PartOfGroup="tumour" Color="#F4FA58"><Coordinates>
<Coordinate Order="1" X="350" Y="100"/><Coordinate Order="0" X="100" Y="100"/>
<Coordinate Order="3" X="100.0" Y="300.0"/><Coordinate Order="2" X="350" Y="300"/></Coordinates></Annotation>
<Annotation Name="b" Type="Dot" PartOfGroup="None"><Coordinates>
<Coordinate Order="0" X="1" Y="1"/></Coordinates></Annotation>
</Annotations><AnnotationGroups/></ASAP_Annotations>"""

APERIO = """<?xml version="1.0" encoding="UTF-8"?>
<Annotations MicronsPerPixel="0.5000"><Annotation Id="1" Name="" Type="4"><Attributes><Attribute Name="Description"
Id="0" Value="tumour"/></Attributes><Regions><RegionAttributeHeaders/>
<Region Id="1" Type="0" NegativeROA="0"><Attributes/><Vertices><Vertex X="100" Y="100" Z="0"/><Vertex X="350" Y="100"/>
<Vertex X="350" Y="300"/><Vertex X="100" Y="300"/></Vertices></Region>
<Region Id="2" Type="1" NegativeROA="1"><Vertices><Vertex X="150" Y="150"/><Vertex X="200" Y="150"/>
<Vertex X="200" Y="200"/><Vertex X="150" Y="200"/></Vertices></Region>
<Region Id="3" Type="4"><Vertices><Vertex X="0" Y="0"/><Vertex X="9" Y="9"/></Vertices></Region></Regions></Annotation>
<Annotation Id="2" Name=""><Regions><Region Type="2"><Vertices>
<Vertex X="500" Y="500"/><Vertex X="700" Y="600"/></Vertices>
</Region></Regions></Annotation></Annotations>"""


def test_asap_and_aperio(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(ASAP)
    found = read(path)
    assert {name: area.area for name, area in found.areas.items()} == {"tumour": 50000} and found.ignored == 1
    path.write_text(APERIO)
    found = read(path)
    assert found.ignored == 1 and found.areas["tumour"].area == 50000 - 2500
    assert found.areas["layer 2"].area == pytest.approx(np.pi * 100 * 50, rel=1e-3)


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><ASAP_Annotations>&d;</ASAP_Annotations>'
FAR = [[2000, 2000], [3000, 2000], [3000, 3000], [2000, 3000], [2000, 2000]]
MOSTLY_OUTSIDE = [[900, 0], [1500, 0], [1500, 100], [900, 100], [900, 0]]
BAD = {
    "another slide": ("geojson", [feature("Polygon", [FAR])], "level-0 px of the slide"),
    "half outside": ("geojson", [feature("Polygon", [MOSTLY_OUTSIDE])], "from .900, 0. to .1500, 100."),
    "fractions": ("geojson", [feature("Polygon", [[[0, 0], [1, 0], [1, 0.5], [0, 0]]])], "numbers up to 1"),
    "bow tie": ("geojson", [feature("Polygon", [BOW_TIE])], r"polygon 1 .class 'tumour'.: .*cross itself.*200 200"),
    "hole outside": ("geojson", [feature("Polygon", [HOLE, SQUARE])], "cross itself"),
    "not finite": ("geojson", [feature("Polygon", [[[0, 0], [9, 0], [float("nan"), 9]]])], "not finite"),
    "words": ("geojson", [feature("Polygon", [[["a", 0], [9, 0], [9, 9]]])], "could not convert"),
    "two points": ("geojson", [feature("Polygon", [[[0, 0], [9, 0], [0, 0]]])], "less than three points"),
    "depth": ("geojson", [feature("Polygon", SQUARE)], "QuPath"),
    "circle": ("geojson", [feature("Circle", [1, 2, 3])], "unknown geometry 'Circle'"),
    "no feature": ("geojson", [{"type": "Polygon", "coordinates": [SQUARE]}], "no list of GeoJSON features"),
    "no JSON": ("geojson", "{", "QuPath"),
    "deep": ("geojson", "[" * 100_000, "nested too deeply"),
    "a number": ("geojson", "5", "no list"),
    "crs": ("geojson", '{"type": "FeatureCollection", "crs": {"type": "name"}, "features": []}', "reference system"),
    "bytes": ("geojson", b"\xff\xfe\x00", "QuPath"),
    "entities": ("xml", BOMB, "document type declaration"),
    "entities as UTF-16": ("xml", BOMB.encode("utf-16"), "document type declaration"),
    "cut XML": ("xml", ASAP[:-40], "no element found|mismatched|not well-formed|unclosed"),
    "another root": ("xml", "<svg/>", "<svg>"),
    "other spacing": ("xml", APERIO.replace("0.5000", "0.2500"), "0.5 µm/px, found 0.25"),
    "no X": ("xml", ASAP.replace('X="350"', 'Z="1"'), "'X'"),
    "another kind": ("txt", "", ".geojson .QuPath. or .xml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    suffix, content, message = BAD[case]
    path = tmp_path / f"a.{suffix}"
    if isinstance(content, list):
        write(path, *content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"could not read them: No such file"):
        read(tmp_path / "a.geojson")


def test_settings() -> None:
    check_roi_settings(TileConfig(roi_include=["a"], min_roi=1.0))
    for settings in ({"roi_include": [""]}, {"min_roi": 0.0}, {"min_roi": 1.5}):
        with pytest.raises(ConfigError):
            check_roi_settings(TileConfig(**settings))


def test_a_class_that_no_file_has_is_named(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.geojson", feature("Polygon", [SQUARE], n)) for n in ("tumour", "artefact")]
    broken = tmp_path / "broken.geojson"
    broken.write_text("{")
    assert unmatched([broken, *paths], TileConfig(roi_include=["tum*"], roi_exclude=["artefact"])) == ""
    warning = unmatched([broken, *paths], TileConfig(roi_include=["tumour"], roi_exclude=["artifact"]))
    assert "'artifact'" in warning and "artefact, tumour" in warning and "'tumour'" not in warning
