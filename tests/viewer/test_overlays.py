"""Label images of clusters and words, read with tifffile, against the tables of tiles and words."""

import csv
import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from dino import api
from dino.cli.main import app
from dino.config.load import load_config
from dino.config.schema import OverlaysConfig, WordsConfig
from dino.errors import ConfigError, DataError
from dino.extraction.encoder_features import EncoderFeatures
from dino.extraction.label_images import label_image
from dino.extraction.pyramid import halved_labels, write_pyramid
from dino.slides.tables import SlideTiles
from tests.viewer.conftest import PATIENTS, write_features

STEP, SPACING = 64, 0.5  # level-0 px of a tile, µm per px


@pytest.fixture
def root(painted, features, tmp_path):
    """A ROOT of its own, with the features of encoder "random"."""
    return shutil.copytree(painted, tmp_path / "root")


def _export(root, output, **settings):
    return api.export_overlays(root, output, load_config(OverlaysConfig, overrides=settings))


def _read(path):
    """Labels, µm per px, colour table ``(256, 3)`` and description, as other programs find them."""
    with tifffile.TiffFile(path) as file:
        xml = ElementTree.fromstring(file.ome_metadata or "")
        (pixels,) = xml.findall("{*}Image/{*}Pixels")
        assert pixels.get("PhysicalSizeXUnit") == pixels.get("PhysicalSizeYUnit") == "µm"
        assert {plane.get(f"Position{axis}") for plane in pixels.findall("{*}Plane") for axis in "XY"} == {"0.0"}
        sizes = [float(pixels.attrib[f"PhysicalSize{axis}"]) for axis in "XY"]
        table = np.asarray(file.series[0].levels[0].keyframe.colormap)  # (3, 256) uint16
        about = json.loads(xml.findtext("{*}Image/{*}Description") or "")
        return file.series[0].asarray(), sizes, (table // 257).T, about


def _tiles(root):
    with (root / "tiles.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_labels_are_at_the_tiles_of_the_table_in_um(root, catalogue, tmp_path):
    paths = _export(root, tmp_path / "labels", clusters=4)
    features = EncoderFeatures(catalogue, "random", 4)
    assert {path.name for path in paths} == {f"{slide}.ome.tif" for slide in PATIENTS}
    for slide_id in PATIENTS:
        values, (x_um, y_um), colours, about = _read(tmp_path / "labels" / f"{slide_id}.ome.tif")
        assert values.dtype == np.uint8 and x_um == y_um == STEP * SPACING
        clusters, coords = features.cluster(slide_id), catalogue.tiles[slide_id].coords
        known = {tuple(xy): cluster for xy, cluster in zip(coords.tolist(), clusters, strict=True)}
        places = [(int(row["x"]), int(row["y"])) for row in _tiles(root) if row["slide_id"] == slide_id]
        for x, y in places:  # the label at the centre of each tile, found by its place in µm
            column, row = int((x + STEP / 2) * SPACING / x_um), int((y + STEP / 2) * SPACING / y_um)
            assert values[row, column] == known[x, y] + 1
        area = [np.sum(values == label) * x_um * y_um for label in range(1, 5)]
        assert area == [np.sum(clusters == cluster) * (STEP * SPACING) ** 2 for cluster in range(4)]
        assert np.sum(values > 0) == len(places)  # 0 elsewhere
        assert [one["name"] for one in about["labels"]] == ["no tile", *(f"Cluster {i}" for i in range(1, 5))]
        assert [one["colour"] for one in about["labels"]] == colours[:5].tolist()
        assert [tuple(one) for one in colours[1:5].tolist()] == [label.colour for label in features.labels()]
        assert about["slide_id"] == slide_id and about["encoder"] == "random"


def test_labels_are_words_with_the_names_that_people_gave(root, tmp_path):
    api.find_words("random", root, load_config(WordsConfig, overrides={"count": 3}))
    table = root / "words_random" / "words.csv"
    table.write_text("word,name\n1,<b>Fett & µ\n3,stroma\n")
    (path, *_) = _export(root, tmp_path / "labels")
    words = _tiles(root / "words_random")
    values, _, _, about = _read(path)
    here = [row for row in words if f"{row['slide_id']}.ome.tif" == path.name]
    assert all(values[int(row["y"]) // STEP, int(row["x"]) // STEP] == int(row["word"]) for row in here)
    assert np.sum(values > 0) == len(here)
    assert [one["name"] for one in about["labels"]] == ["no tile", "<b>Fett & µ", "Word 2", "stroma"]
    table.write_text("word,name\n1,fat\n2,stroma\n3,stroma\n")  # renamed: written again
    _export(root, tmp_path / "labels")
    labels = json.loads((tmp_path / "labels" / "labels.json").read_text())["labels"]
    assert [one["name"] for one in labels] == ["no tile", "fat", "stroma", "stroma"]
    assert labels[2]["colour"] == labels[3]["colour"] and _read(path)[3]["labels"] == labels


def test_of_overlapping_tiles_the_nearest_is_shown():
    """Against the nearest centre of a tile that covers the px, px by px; ties are any of the nearest."""
    rng = np.random.default_rng(0)
    for per_side in (2, 3, 4):
        side = 96 / per_side
        places = [(c, r) for r in range(9) for c in range(11) if rng.random() < 0.7]
        tiles = SlideTiles("a", np.round(np.array(places) * side).astype(np.int64), 96, 0.5, np.ones(len(places)))
        labels = rng.integers(0, 5, len(places))
        image = label_image(tiles, labels, (96 * 4, 96 * 4), per_side)
        for row, column in np.ndindex(*image.shape):
            covering = [
                (max((c + per_side / 2 - column - 0.5) ** 2 + (r + per_side / 2 - row - 0.5) ** 2, 0), int(label))
                for (c, r), label in zip(places, labels, strict=True)
                if label and c <= column < c + per_side and r <= row < r + per_side
            ]
            nearest = {label for distance, label in covering if distance == min(covering)[0]}
            assert image[row, column] in (nearest or {0})


def test_smaller_levels_have_the_most_frequent_label(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (701, 1303)).astype(np.uint8)
    colours = np.array([[0, 0, 0], [255, 0, 0], [1, 2, 3], [9, 9, 9]], np.uint8)
    write_pyramid(tmp_path / "a.ome.tif", lambda: iter([values]), ["a"], values.shape, 1.0, colours=colours)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        levels = [level.asarray() for level in file.series[0].levels]
    assert [level.shape for level in levels] == [(701, 1303), (351, 652), (176, 326)]
    np.testing.assert_array_equal(levels[0], values)
    np.testing.assert_array_equal(levels[2], halved_labels(halved_labels(values)))
    for row, column in rng.integers(0, (350, 651), (500, 2)):
        four = values[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel()
        counts = np.bincount(four, minlength=4)
        assert counts[levels[1][row, column]] == counts.max()


def test_what_is_there_is_not_replaced_by_something_else(root, tmp_path):
    """Not labels of other clusters, nor slides, nor maps of attention."""
    out = tmp_path / "labels"
    _export(root, out, clusters=4)
    labels = _read(out / "one.ome.tif")
    _export(root, out, clusters=4)
    np.testing.assert_array_equal(_read(out / "one.ome.tif")[0], labels[0])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match='labels made with different .*kind "4 clusters", now "3 clusters"; name anoth'):
        _export(root, out, clusters=3)
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "one.ome.tif").write_bytes(b"a slide")
    with pytest.raises(DataError, match="expected a record of the labels in .*slides.*, found none"):
        _export(root, slides)
    assert (slides / "one.ome.tif").read_bytes() == b"a slide"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_bad_input_of_overlays_is_one_line(root, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="expected to write to"):
        _export(root, blocked / "out")
    with pytest.raises(ConfigError, match="expected 2 to 64 clusters, found 65"):
        _export(root, tmp_path / "out", clusters=65)
    with pytest.raises(DataError, match="expected features of 'other' in .*features_other, found none"):
        _export(root, tmp_path / "out", encoder="other")
    write_features(root, "second")
    with pytest.raises(ConfigError, match="expected to know whose clusters to export, .* pass encoder=random"):
        _export(root, tmp_path / "out")
    for name in ("random", "second"):
        shutil.rmtree(root / f"features_{name}")
    done = CliRunner().invoke(app, ["export", "overlays", str(root), str(tmp_path / "out")])
    assert done.exit_code == 2 and "error: expected features of tiles in" in done.stderr
    assert not (tmp_path / "out").exists()
