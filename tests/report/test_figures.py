"""Every figure is a picture of the right kind that says what it should, drawn from made-up tissue."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dino.report import attention, curves, maps, sheets, style


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tissue(rng, *size):
    return rng.integers(120, 255, (*size, 3), dtype=np.uint8)


def decoded(content):
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
def ground(rng):
    return maps.Ground(thumbnail=tissue(rng, 120, 90), downsample=8.0, um_per_px=4.0)


def test_tiling_map_is_a_jpeg_within_its_budget(ground):
    tiles = np.array([(0, 0), (64, 0), (128, 64)])
    content = maps.tiling_map(ground, tiles, 64, np.array([(0, 0, 256, 256)]), shown=[0])
    assert style.media_type(content) == "image/jpeg"
    assert decoded(content).shape[1] <= 11 * style.PHOTO_DPI
    assert len(content) < 300_000


def test_tiling_map_without_regions(ground):
    assert decoded(maps.tiling_map(ground, np.zeros((1, 2)), 64, np.zeros((0, 4)))).size


def test_feature_map_paints_each_square_in_its_place(ground):
    tiles = np.array([(0, 0), (640, 880)])
    painted = maps.paint(ground, tiles, 80, np.array([(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]))
    assert (painted[:10, :10] == (255, 0, 0)).all()
    assert (painted[110:120, 80:90] == (0, 0, 255)).all()
    assert (painted[10:110] != (255, 0, 0)).any(-1).all()
    assert decoded(maps.feature_maps(ground, [("Untrained", np.zeros((2, 3)))], tiles, 80)).size


def test_neighbouring_squares_meet_without_a_seam(ground):
    tiles = np.array([(x, 0) for x in range(0, 720, 45)])  # 5.6 thumbnail px: every edge is rounded
    assert maps.coverage(ground, tiles, 45)[:5].all()


def test_crop_sheet(rng):
    crops = [[tissue(rng, 96, 96)] * 2 + [tissue(rng, 48, 48)] * 3] * 2
    content = sheets.crop_sheet([tissue(rng, 256, 256)] * 2, crops, 0.5)
    height, width = decoded(content).shape[:2]
    assert style.media_type(content) == "image/jpeg"
    assert width > height


def test_neighbour_sheet(rng):
    cells = [[sheets.Cell(tissue(rng, 32, 32), "0.91")] * 2]
    assert decoded(sheets.neighbour_sheet([tissue(rng, 32, 32)], cells, cells)).size


def test_attention_reddens_where_the_token_looks(rng):
    pixels = np.full((64, 64, 3), 200, dtype=np.uint8)
    weights = np.zeros((4, 4))
    weights[1, 2] = 1.0
    seen = attention.overlay(pixels, weights, smooth=False).astype(int)
    redness = seen[..., 0] - seen[..., 2]
    assert redness[16:32, 32:48].min() > 60
    redness[16:32, 32:48] = 0
    assert redness.max() == 0


def test_uniform_attention_is_even():
    seen = attention.overlay(np.full((8, 8, 3), 255, dtype=np.uint8), np.full((2, 2), 0.25))
    assert (seen == seen[0, 0]).all()


@pytest.mark.parametrize("untrained", [True, False])
def test_attention_sheet_skips_heads_that_are_not_there(rng, untrained):
    weights = rng.random((2, 2, 4, 4))
    pictures = [tissue(rng, 64, 64)] * 2
    content = attention.attention_sheet(pictures, weights, weights if untrained else None, 0.5, heads=(0, 1, 2))
    assert style.media_type(content) == "image/jpeg"


def svg_text(content):
    root = ElementTree.fromstring(content.decode())
    assert root.tag.endswith("svg")
    return " ".join(element.text or "" for element in root.iter() if element.tag.endswith("text"))


def test_curves_show_knn_where_it_was_measured():
    line = {"loss_relative": 0.9, "teacher_entropy_relative": 0.8, "lr": 1e-4, "grad_norm": 2.0}
    lines = [{"step": step, **line} for step in (10, 20, 30)]
    assert "Gradient norm" in svg_text(curves.curves(lines))
    scores = {"teacher": {"knn_20_accuracy": 0.6}, "untrained": {"knn_20_accuracy": 0.5}}
    text = svg_text(curves.curves([*lines, {"step": 30, "evaluation": scores}]))
    assert "kNN 20 accuracy" in text
    assert "Gradient norm" not in text


def test_curves_without_lines_say_so():
    assert "not recorded" in svg_text(curves.curves([]))


def test_curves_repeat_to_the_byte():
    lines = [{"step": 1, "loss_relative": 1.0}]
    assert curves.curves(lines) == curves.curves(lines)


def test_png_is_valid():
    with style.figure(1, 1) as figure:
        content = style.png(figure)
    assert style.media_type(content) == "image/png"
    assert decoded(content).shape[0] == style.PHOTO_DPI


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1), (74.0, 50), (199.9, 100), (2600.0, 2000), (0.3, 0.2)])
def test_round_length(limit, expected):
    assert style.round_length(limit) == pytest.approx(expected)


def test_unknown_bytes_are_refused():
    with pytest.raises(ValueError, match="expected PNG"):
        style.media_type(b"GIF89a")
