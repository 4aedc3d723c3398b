"""Single figures: where values land on a slide, files of each kind and format, and wrong input."""

import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dino import api
from dino.cli.main import app
from dino.config.schema import FigureConfig
from dino.data import SlideRanges
from dino.errors import ConfigError
from dino.extraction.catalogue import read_catalogue
from dino.extraction.encoder_features import EncoderFeatures, Label
from dino.extraction.words import Count
from dino.report import figures, montages, style
from dino.report.features import neighbour_images
from dino.report.figures import Thumbnail
from dino.report.heatmap import heatmap, place
from dino.report.tiles import TileSet, spread
from dino.report.words import WordData, WordMap, one_word, slide_map

QUICK = FigureConfig(dpi=40, tiles=40, rows=2, device="cpu")


@pytest.fixture
def thumbnail():
    return Thumbnail(np.full((60, 80, 3), 200, dtype=np.uint8), downsample=16.0, um_per_px=8.0)


def test_a_constant_map_stays_constant_where_parts_overlap(thumbnail):
    boxes = np.array([(x, y, 256, 256) for x in (0, 64, 128) for y in (0, 32)], dtype=float)
    values = place(thumbnail, boxes, [np.full((4, 4), 3.0)] * len(boxes))
    assert np.unique(values[np.isfinite(values)]) == pytest.approx([3.0])
    inside = np.zeros((60, 80), dtype=bool)
    inside[: (32 + 256) // 16, : (128 + 256) // 16] = True
    assert (np.isfinite(values) == inside).all()


@pytest.mark.parametrize("offset", [(0, 0), (64, 0), (16, 48)])
def test_one_hot_cell_lands_where_it_is(thumbnail, offset):
    hot = np.zeros((4, 4))
    hot[1, 2] = 1.0  # second row, third column: 64 px further down, 128 px further right
    values = place(thumbnail, np.array([(*offset, 256, 256)], dtype=float), [hot])
    expected = np.zeros((60, 80), dtype=bool)
    x, y = offset[0] + 128, offset[1] + 64
    expected[y // 16 : (y + 64) // 16, x // 16 : (x + 64) // 16] = True
    assert ((values == 1) == expected).all()


def test_parts_that_overlap_are_averaged_in_place(thumbnail):
    boxes = np.array([(0, 0, 128, 128), (64, 0, 128, 128)], dtype=float)
    values = place(thumbnail, boxes, [np.full((2, 2), 1.0), np.full((2, 2), 3.0)])
    assert values[0, [0, 3, 4, 7, 8, 11]] == pytest.approx([1, 1, 2, 2, 3, 3])


def test_a_heatmap_is_red_where_the_values_are_high(thumbnail):
    values = np.full((60, 80), np.nan)
    values[:30], values[30:] = 0.5, 4.0
    content = heatmap(thumbnail, [("attention", values)], style.encoder("png", 50))
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    redness = (pixels[..., 0] - pixels[..., 2]) > 60
    rows = np.flatnonzero(redness[:, pixels.shape[1] // 2 :].mean(1) > 0.3)
    assert len(rows) and rows.min() > pixels.shape[0] / 2


def test_neighbours_are_of_other_patients():
    rng = np.random.default_rng(0)
    pixels = [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(12)]
    owners = [f"patient {i // 4}" for i in range(12)]
    tiles = TileSet(pixels, [str(i) for i in range(12)], [f"slide {i // 2}" for i in range(12)], owners, 0.5)
    features = rng.normal(size=(12, 5))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    (row,) = neighbour_images(tiles, features, [5], 20)
    found = [int(image.pixels[0, 0, 0]) for image in row]
    others = [i for i in range(12) if owners[i] != owners[5]]
    assert found == sorted(others, key=lambda i: -unit[i] @ unit[5])
    assert row[0].notes == [f"{unit[found[0]] @ unit[5]:.2f}", f"slide {found[0] // 2}"]
    alone = TileSet(pixels, tiles.names, tiles.slides, ["one"] * 12, 0.5)
    assert len(neighbour_images(alone, features, [5], 20)[0]) == 11 and alone.patients == 1


def test_tiles_are_spread_over_slides():
    ranges = SlideRanges.of(
        [slide for slide, count in (("a", 1000), ("b", 10), ("a", 500), ("c", 3)) for _ in range(count)]
    )
    found = spread(ranges, 30)
    assert len(found) <= 30 and len({*found}) == len(found)
    slides = [
        next(s for s, a, b in zip(ranges.slide_ids, ranges.starts, ranges.starts[1:], strict=False) if a <= i < b)
        for i in found
    ]
    assert [slides.count(name) for name in "abc"] == [10, 10, 3]
    assert any(i >= 1010 for i in found)  # also of the second part of a
    many = SlideRanges.of(f"slide {i // 5}" for i in range(5000))
    assert len({i // 5 for i in spread(many, 40)}) == 10


def test_long_names_are_shortened_in_their_middle():
    assert montages.shorten("TCGA-CR-7395-01A", 9) == "TCGA…-01A"
    assert montages.shorten("short", 9) == "short"


@pytest.mark.parametrize(
    ("kind", "level", "name"),
    [
        ("attention", "patch", "a.png"),
        ("attention", "region", "a.pdf"),
        ("heatmap", "patch", "a.svg"),
        ("heatmap", "region", "a.png"),
        ("neighbours", "patch", "a.pdf"),
        ("pca", "patch", "a.png"),
        ("words", "patch", "a.svg"),
        ("words", "patch", "a.png"),
    ],
)
def test_each_kind_is_written(chain, tmp_path, kind, level, name):
    root = shutil.copytree(chain.root, tmp_path / "root") if kind == "words" else chain.root  # words are written there
    output = api.figure(kind, str(getattr(chain, level)), root, tmp_path / name, QUICK)
    content = output.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[name[2:]])
    if name.endswith("png"):
        with Image.open(output) as picture:
            assert picture.info["dpi"][0] == pytest.approx(40, abs=0.1)


def test_a_tile_that_is_named_is_the_query(chain, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(montages, "neighbour_montage", lambda queries, *_: shown.update(queries=queries) or b"x")
    config = FigureConfig(dpi=40, tiles=20, tile="512,1024", untrained=True, device="cpu")
    api.figure("neighbours", str(chain.patch), chain.root, tmp_path / "a.png", config)
    (query,) = shown["queries"]
    assert query.pixels.shape == (64, 64, 3) and query.notes == ["CMU-1-Small-Region"] and query.um_per_px > 0


def test_the_same_figure_has_the_same_bytes(chain, tmp_path):
    files = [api.figure("pca", str(chain.patch), chain.root, tmp_path / name, QUICK) for name in ("a.svg", "b.svg")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_colours_over_all_slides_are_those_of_the_viewer(chain, tmp_path, monkeypatch):
    """Tiles whose features are stored are not embedded again, and have the colours of one basis for all slides."""
    shown = {}
    monkeypatch.setattr(
        figures, "feature_maps", lambda _, panels, *rest: shown.update(panels=panels, rest=rest) or b"x"
    )
    api.figure("pca", str(chain.patch), chain.root, tmp_path / "a.png", QUICK)
    catalogue = read_catalogue(chain.root)
    features = EncoderFeatures(catalogue, "patch")
    ((title, rgb),) = shown["panels"]
    assert title == "Principal components over 1 slide"
    np.testing.assert_array_equal(np.rint(rgb * 255), features.rgb("CMU-1-Small-Region"))
    corners, square, _ = shown["rest"]
    tiles = catalogue.tiles["CMU-1-Small-Region"]
    assert square == tiles.step_lv0 / 2  # they overlap by half
    np.testing.assert_array_equal(corners, tiles.coords + square / 2)


def test_the_product_is_that_of_both_levels_in_place(chain, tmp_path, monkeypatch):
    shown = {}

    def drawn(thumbnail, maps, encode):
        shown.update(maps)
        return b"x"

    monkeypatch.setattr("dino.api.figures.heatmap", drawn)
    config = FigureConfig(dpi=40, tiles=400, level_1=str(chain.patch), device="cpu")
    api.figure("heatmap", str(chain.region), chain.root, tmp_path / "a.png", config)
    tiles, regions, product = shown.values()
    assert list(shown) == ["Attention over tiles", "Attention over regions", "Product"]
    both = np.isfinite(tiles) & np.isfinite(regions)
    assert both.any() and (np.isfinite(product) == both).all()
    np.testing.assert_allclose(product[both], tiles[both] * regions[both])
    assert np.nanmean(tiles) == pytest.approx(1, abs=0.1)  # relative to uniform attention
    other = FigureConfig(dpi=40, tiles=40, level_1=str(chain.region), device="cpu")
    with pytest.raises(ConfigError, match="expected a level-1 model as level_1, found the level-2 model"):
        api.figure("heatmap", str(chain.region), chain.root, tmp_path / "b.png", other)


def _picture(content):
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_word_is_where_its_tiles_are():
    """On a map of all words, the squares have the colours of the legend; on that of one, only its own are shown."""
    labels = [Label("keratin", (0, 0, 255)), Label("fat", (0, 255, 0))]
    corners = np.array([(x, y) for y in range(0, 800, 100) for x in range(0, 800, 100)])
    words = (corners[:, 0] >= 400).astype(int)  # keratin on the left, fat on the right
    where = WordMap("a", Thumbnail(np.full((400, 400, 3), 90, np.uint8), 2.0, 1.0), corners, 100.0, words)
    tile = np.full((8, 8, 3), 90, np.uint8)
    data = WordData("e", labels, [Count(32, 1, 1)] * 2, [[tile], [tile]], 1, 128.0)
    blue, green = ((pixels := _picture(slide_map(data, where, style.encoder("png", 100))))[..., c] for c in (2, 1))
    is_blue = (blue > 250) & (pixels[..., 0] < 5) & (green < 5)
    is_green = (green > 250) & (pixels[..., 0] < 5) & (blue < 5)
    left, right = (np.flatnonzero(one.sum(0) > pixels.shape[0] / 2) for one in (is_blue, is_green))  # whole columns
    assert len(left) == pytest.approx(len(right), abs=2) and len(left) > 100
    assert left[-1] - left[0] == len(left) - 1 and right[0] - left[-1] in (1, 2)
    pixels = _picture(one_word(data, 1, [where], style.encoder("png", 100)))
    assert not ((pixels[..., 2] > 200) & (pixels[..., 1] < 60)).any()  # no keratin
    assert ((pixels[..., 1] > 200) & (pixels[..., 2] < 60)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("attention PATCH ROOT", "expected KIND MODEL ROOT OUT"),
        (
            "portrait PATCH ROOT a.png",
            "expected a figure attention, heatmap, neighbours, pca, umap, words, found 'portrait'",
        ),
        ("pca PATCH ROOT a.gif", "expected a figure ending in .png, .pdf, .svg"),
        ("pca REGION ROOT a.png", "expected a level-1 model for the figure 'pca'"),
        ("pca PATCH nowhere a.png", "expected a data folder at nowhere, found nothing"),
        ("pca PATCH ROOT a.png slide=b", "expected slide=b among the slides"),
        ("attention PATCH ROOT a.png heads=[9]", "expected heads from 1 to 3, found 9"),
        ("attention PATCH ROOT a.png tile=here", "expected tile=X,Y in level-0 px, or an image file, found 'here'"),
        ("attention PATCH ROOT a.png tile=90000,0", "expected tile=X,Y inside slide"),
        ("attention REGION ROOT a.png tile=1,1", "expected tile=X,Y of a region of slide"),
        ("neighbours EXPORT ROOT a.png untrained=true", "expected a run as MODEL for untrained=true"),
        ("words PATCH ROOT a.png word=99", "expected word from 1 to"),
        ("words REGION ROOT a.png", "expected the level-1 run that made the features of"),
        ("words PATCH ROOT a.png slide=b", "expected slide=b among the slides with features of patch"),
        ("neighbours PATCH ROOT a.png k=0", "expected k of at least 1, found 0"),
        ("attention PATCH PATCH a.png", "expected"),
    ],
)
def test_wrong_input_ends_with_one_line(chain, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(chain.root, tmp_path / "root") if arguments.startswith("words") else chain.root
    named = {"PATCH": chain.patch, "REGION": chain.region, "ROOT": root, "EXPORT": chain.patch / "backbone"}
    result = CliRunner().invoke(app, ["figure", *(str(named.get(word, word)) for word in arguments.split())])
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", result.output)
    assert not (tmp_path / "a.png").exists()
