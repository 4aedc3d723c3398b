"""Figures of random tissue: format, size and content."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dino.report import curves, figures, montages, style


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
def thumbnail(rng):
    return figures.Thumbnail(pixels=tissue(rng, 120, 90), downsample=8.0, um_per_px=4.0)


def test_tiling_map_is_a_jpeg_within_its_budget(thumbnail):
    tiles = np.array([(0, 0), (64, 0), (128, 64)])
    content = figures.tiling_map(thumbnail, tiles, 64, np.array([(0, 0, 256, 256)]), shown=[0])
    assert style.media_type(content) == "image/jpeg"
    assert decoded(content).shape[1] <= 11 * style.JPEG_DPI
    assert len(content) < 300_000


def test_tiling_map_without_regions(thumbnail):
    assert decoded(figures.tiling_map(thumbnail, np.zeros((1, 2)), 64, np.zeros((0, 4)))).size


def test_feature_map_fills_each_square_at_its_position(thumbnail):
    tiles = np.array([(0, 0), (640, 880)])
    filled = figures.fill_squares(thumbnail, tiles, 80, np.array([(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]))
    assert (filled[:10, :10] == (255, 0, 0)).all()
    assert (filled[110:120, 80:90] == (0, 0, 255)).all()
    assert (filled[10:110] != (255, 0, 0)).any(-1).all()
    assert decoded(figures.feature_maps(thumbnail, [("Untrained", np.zeros((2, 3)))], tiles, 80)).size


def test_adjacent_squares_leave_no_gap(thumbnail):
    tiles = np.array([(x, 0) for x in range(0, 720, 45)])  # 5.6 thumbnail px: every edge is rounded
    assert figures.tile_mask(thumbnail, tiles, 45)[:5].all()


def test_crop_montage(rng):
    crops = [[tissue(rng, 96, 96)] * 2 + [tissue(rng, 48, 48)] * 3] * 2
    content = montages.crop_montage([tissue(rng, 256, 256)] * 2, crops, 0.5)
    height, width = decoded(content).shape[:2]
    assert style.media_type(content) == "image/jpeg"
    assert width > height


def test_neighbour_montage(rng):
    neighbours = [[montages.MontageImage(tissue(rng, 32, 32), ["0.91", "a-slide-with-a-long-name"], 0.5)] * 2]
    query = montages.MontageImage(tissue(rng, 32, 32))
    assert decoded(montages.neighbour_montage([query], neighbours, neighbours)).size
    assert decoded(montages.neighbour_montage([query], neighbours, [])).size


def test_attention_is_red_where_it_is_high(rng):
    pixels = np.full((64, 64, 3), 200, dtype=np.uint8)
    weights = np.zeros((4, 4))
    weights[1, 2] = 1.0
    seen = montages.attention_overlay(pixels, weights, smooth=False).astype(int)
    redness = seen[..., 0] - seen[..., 2]
    assert redness[16:32, 32:48].min() > 60
    redness[16:32, 32:48] = 0
    assert redness.max() == 0


def test_uniform_attention_has_one_colour():
    seen = montages.attention_overlay(np.full((8, 8, 3), 255, dtype=np.uint8), np.full((2, 2), 0.25))
    assert (seen == seen[0, 0]).all()


@pytest.mark.parametrize("untrained", [True, False])
def test_attention_montage_skips_heads_that_do_not_exist(rng, untrained):
    weights = rng.random((2, 2, 4, 4))
    images = [tissue(rng, 64, 64)] * 2
    content = montages.attention_montage(images, weights, weights if untrained else None, 0.5, heads=(0, 1, 2))
    assert style.media_type(content) == "image/jpeg"


def svg_text(content):
    root = ElementTree.fromstring(content.decode())
    assert root.tag.endswith("svg")
    return " ".join(element.text or "" for element in root.iter() if element.tag.endswith("text"))


def training(lines):
    return curves.training_curves([curves.Series("run", lines)])


def test_curves_show_knn_if_it_was_measured():
    line = {"loss_relative": 0.9, "teacher_entropy_relative": 0.8, "lr": 1e-4, "grad_norm": 2.0}
    lines = [{"step": step, **line} for step in (10, 20, 30)]
    assert "Gradient norm" in svg_text(training(lines))
    scores = {"teacher": {"knn_20_accuracy": 0.6}, "untrained": {"knn_20_accuracy": 0.5}}
    text = svg_text(training([*lines, {"step": 30, "evaluation": scores}]))
    assert "kNN 20 accuracy" in text
    assert "Gradient norm" not in text


def test_curves_without_values():
    assert "not recorded" in svg_text(training([]))


def test_curves_are_reproducible():
    lines = [{"step": 1, "loss_relative": 1.0}]
    assert training(lines) == training(lines)


def test_figures_have_their_intended_size_on_the_page():
    with style.figure(2, 1) as figure:
        content = style.figure_to_jpeg(figure)
    assert decoded(content).shape == (style.JPEG_DPI, 2 * style.JPEG_DPI, 3)
    assert style.display_width(content) == 2 * style.CSS_PX_PER_INCH


def test_png_is_recognised(rng):
    buffer = io.BytesIO()
    Image.fromarray(tissue(rng, 8, 8)).save(buffer, "PNG")
    assert style.media_type(buffer.getvalue()) == "image/png"


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1), (74.0, 50), (199.9, 100), (2600.0, 2000), (0.3, 0.2)])
def test_round_length(limit, expected):
    assert style.round_length(limit) == pytest.approx(expected)


def test_unknown_bytes_have_no_media_type():
    with pytest.raises(ValueError, match="expected PNG"):
        style.media_type(b"GIF89a")
