"""The GeoJSON for QuPath: its published structure, and areas that agree with the tables."""

import csv
import json
import shutil

import numpy as np
import pytest
import shapely

from dino import api
from dino.config.load import load_config
from dino.config.schema import GeojsonConfig
from dino.errors import ConfigError, DataError
from dino.extraction.pyramid import write_pyramid
from dino.slides.tables import SlideTiles
from dino.viewer.geojson import outline_feature
from tests.viewer.conftest import PATIENTS


def _export(root, output, **settings):
    return api.export_geojson(root, output, load_config(GeojsonConfig, overrides=settings))


@pytest.fixture(scope="module")
def exported(painted, features, tmp_path_factory):
    output = tmp_path_factory.mktemp("qupath")
    paths = _export(painted, output, encoder="random", clusters=4)
    return {path.stem: json.loads(path.read_text()) for path in paths}


def _by_kind(collection, prefix):
    return [one for one in collection["features"] if one["properties"]["classification"]["name"].startswith(prefix)]


def test_one_file_per_slide(exported):
    assert exported.keys() == PATIENTS.keys()


def test_structure_is_that_of_rfc_7946_and_of_qupath(exported):
    """RFC 7946, sections 3.1.6 and 3.3; objectType, classification and measurements as QuPath writes them."""
    for collection in exported.values():
        assert collection["type"] == "FeatureCollection"
        ids = [one["id"] for one in collection["features"]]
        assert len(ids) == len(set(ids))
        for one in collection["features"]:
            assert one["type"] == "Feature"
            assert one["geometry"]["type"] in ("Polygon", "MultiPolygon")
            polygons = one["geometry"]["coordinates"]
            for polygon in [polygons] if one["geometry"]["type"] == "Polygon" else polygons:
                assert [shapely.LinearRing(ring).is_ccw for ring in polygon] == [True, *[False] * (len(polygon) - 1)]
                for ring in polygon:
                    assert len(ring) >= 4 and ring[0] == ring[-1]
                    assert all(len(position) == 2 for position in ring)
            assert shapely.from_geojson(json.dumps(one["geometry"])).is_valid
            properties = one["properties"]
            assert properties["objectType"] in ("annotation", "tile")
            colour = properties["classification"]["color"]
            assert len(colour) == 3 and all(isinstance(c, int) and 0 <= c <= 255 for c in colour)
            assert all(isinstance(value, (int, float)) for value in properties["measurements"].values())


def test_areas_agree_with_the_table_of_tiles(painted, exported):
    with (painted / "tiles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for slide_id, collection in exported.items():
        squares = {(int(row["x"]), int(row["y"])) for row in rows if row["slide_id"] == slide_id}
        tiles = [one for one in collection["features"] if one["properties"]["objectType"] == "tile"]
        assert len(tiles) == len(squares)
        shapes = [shapely.from_geojson(json.dumps(one["geometry"])) for one in tiles]
        assert {(shape.bounds[0], shape.bounds[1]) for shape in shapes} == squares
        assert {shape.area for shape in shapes} == {64.0 * 64.0}
        clusters = _by_kind(collection, "Cluster")
        outlines = [one for one in clusters if one["properties"]["objectType"] == "annotation"]
        united = [shapely.from_geojson(json.dumps(one["geometry"])) for one in outlines]
        assert sum(shape.area for shape in united) == len(squares) * 64.0 * 64.0
        assert shapely.unary_union(united).area == len(squares) * 64.0 * 64.0  # clusters do not overlap


def test_an_outline_has_the_tiles_of_its_cluster(exported):
    for collection in exported.values():
        for one in collection["features"]:
            if one["properties"]["objectType"] != "annotation" or "Tiles" not in one["properties"]["measurements"]:
                continue
            outline = shapely.from_geojson(json.dumps(one["geometry"]))
            name = one["properties"]["name"]
            tiles = [
                tile
                for tile in _by_kind(collection, name)
                if tile["properties"]["objectType"] == "tile" and tile["properties"]["classification"]["name"] == name
            ]
            assert len(tiles) == one["properties"]["measurements"]["Tiles"]
            assert all(outline.covers(shapely.from_geojson(json.dumps(tile["geometry"]))) for tile in tiles)


def test_regions_are_those_of_the_table(catalogue, exported):
    for slide_id, collection in exported.items():
        found = {tuple(np.ravel(one["geometry"]["coordinates"])[:2]) for one in _by_kind(collection, "Region")}
        assert found == {(one.x, one.y) for one in catalogue.regions.get(slide_id, [])}


def test_outer_rings_and_holes_are_turned_as_rfc_7946_demands():
    """Section 3.1.6: the outer ring counterclockwise, holes clockwise; and the area is that of the tiles."""
    coords = np.array([(x, y) for y in range(5) for x in range(5) if (x, y) not in ((1, 1), (3, 3))]) * 100
    tiles = SlideTiles("a", coords, 100, 0.5, np.ones(len(coords), np.float32))
    one = outline_feature(tiles, range(len(coords)), "keratin", (1, 2, 3), "k")
    outer, *holes = one["geometry"]["coordinates"]
    assert shapely.LinearRing(outer).is_ccw and [shapely.LinearRing(hole).is_ccw for hole in holes] == [False, False]
    assert shapely.from_geojson(json.dumps(one["geometry"])).area == len(coords) * 100**2
    assert one["properties"]["measurements"] == {"Tiles": len(coords), "Area px^2": len(coords) * 100.0**2}


def test_exporting_again_gives_the_same_bytes(painted, features, exported, tmp_path):
    for path in _export(painted, tmp_path, encoder="random", clusters=4):
        assert json.loads(path.read_text()) == exported[path.stem]
    assert not list(tmp_path.glob(".*"))


def test_without_features_tiles_have_one_class(painted, tmp_path):
    from dino.extraction.catalogue import read_catalogue
    from dino.viewer.geojson import CONTENTS, feature_collection

    collection = feature_collection(read_catalogue(painted), "one", CONTENTS)
    assert {one["properties"]["classification"]["name"] for one in collection["features"]} == {"Tile", "Region"}


def test_tiles_have_the_attention_of_the_maps(painted, features, catalogue, tmp_path):
    """Of the encoders that have maps, where a slide has one; values are those of the arrays."""
    status = catalogue.slides.status["one"]
    rows, columns = status.height // 64, status.width // 64  # tiles of 64 px with 4 tokens a side
    rng = np.random.default_rng(0)
    tile = (3 * rng.random((4 * rows, 4 * columns))).astype(np.float32)
    region = (3 * rng.random((rows, columns))).astype(np.float32)
    region[0, 0] = np.nan
    maps = [tile, 100 + tile, region.repeat(4, 0).repeat(4, 1), tile * region.repeat(4, 0).repeat(4, 1)]
    names = ["tile", "tile head 1", "region", "tile x region"]
    folder = painted / "attention_random"
    try:
        write_pyramid(folder / "one.ome.tif", lambda: iter(maps), names, tile.shape, 16 * status.spacing_um)
        files = {path.stem: json.loads(path.read_text()) for path in _export(painted, tmp_path / "a", contents="tiles")}
        (folder / "one.ome.tif").write_bytes((folder / "one.ome.tif").read_bytes()[:2000])
        with pytest.raises(DataError, match="expected maps of `dino attention` in .*one.ome.tif, could not read them"):
            _export(painted, tmp_path / "b")
        assert _export(painted, tmp_path / "c", contents="regions")  # no tiles: maps are not needed
    finally:
        shutil.rmtree(folder)
    measured = {
        (int(x), int(y)): one["properties"]["measurements"]
        for one in files["one"]["features"]
        for x, y in [one["geometry"]["coordinates"][0][0]]
    }
    assert measured.keys() == {(int(x), int(y)) for x, y in catalogue.tiles["one"].coords}
    for (x, y), found in measured.items():
        row, column = y // 64, x // 64
        highest, cell = tile[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].max(), region[row, column]
        expected = {"Attention random: within the tile: Max": highest}
        if np.isfinite(cell):
            expected["Attention random: within the region: Mean"] = cell
            expected["Attention random: both levels: Max"] = highest * cell
        assert {name: value for name, value in found.items() if name.startswith("Attention")} == {
            name: pytest.approx(value, abs=6e-5) for name, value in expected.items()
        }
    others = [one for slide, content in files.items() if slide != "one" for one in content["features"]]
    assert others and not any("Attention" in name for one in others for name in one["properties"]["measurements"])


def test_bad_input_is_one_line(painted, features, tmp_path):
    with pytest.raises(ConfigError, match="expected contents of tiles, clusters, regions, found heat"):
        _export(painted, tmp_path, contents="heat")
    with pytest.raises(DataError, match="expected features of 'other' in .*features_other, found none"):
        _export(painted, tmp_path, encoder="other")
    with pytest.raises(DataError, match=r"expected the ROOT of `dino tile` at .*nowhere, found nothing"):
        _export(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ConfigError, match="expected 2 to 64 clusters, found 1"):
        _export(painted, tmp_path, clusters=1)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="expected to write to"):
        _export(painted, blocked / "out", encoder="random")
