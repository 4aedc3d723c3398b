"""Tissue from segmentation or from a mask, and tissue fractions."""

from pathlib import Path

import numpy as np
import pytest
from painted_slide import noise, write_slide
from PIL import Image

from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError
from dino.slides import tissue
from dino.slides.lattice import Geometry
from dino.slides.reader import SlideReader
from dino.slides.tissue import check_tissue_settings, find_tissue, passes_qc, tissue_fractions

WIDTH, HEIGHT = 640, 384


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tissue on the left half, glass on the right."""
    pixels = np.full((HEIGHT, WIDTH, 3), 245, np.uint8)
    pixels[:, : WIDTH // 2] = noise(WIDTH // 2, HEIGHT)
    return write_slide(tmp_path_factory.mktemp("slides") / "half.tiff", [pixels])


@pytest.fixture
def reader(slide: Path):
    with SlideReader(slide, Geometry(tile_size_px=64, region_cells=2)) as opened:
        yield opened


def save_mask(path: Path, mask: np.ndarray) -> Path:
    Image.fromarray(mask).save(path)
    return path


@pytest.mark.parametrize("method", tissue.METHODS)
def test_tissue_is_found(reader: SlideReader, method: str) -> None:
    mask = find_tissue(reader, None, TileConfig(tissue_method=method)).tissue_mask > 0
    assert mask.shape == (HEIGHT, WIDTH)
    assert mask[:, : WIDTH // 2 - 16].mean() > 0.95 and not mask[:, WIDTH // 2 + 16 :].any()


def test_fractions_are_means_of_the_whole_mask(reader: SlideReader) -> None:
    """All pieces of tissue in a tile are counted, regardless of their contours."""
    mask = (np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.4).astype(np.uint8) * 255
    origins = reader.lattice.tile_origins()
    expected = [(mask[y : y + 64, x : x + 64] > 0).mean() for x, y in origins]
    np.testing.assert_allclose(tissue_fractions(mask, origins, reader), expected, atol=1e-6)


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("scale", [1, 4])
def test_a_given_mask_may_have_any_scale(reader: SlideReader, tmp_path: Path, value: int, scale: int) -> None:
    wanted = np.zeros((HEIGHT // 64, WIDTH // 64), np.uint8)  # by tile
    wanted[1:4, 2:9:3] = 1
    mask = np.kron(wanted, np.full((64 // scale, 64 // scale), value, np.uint8))
    found = find_tissue(reader, save_mask(tmp_path / "mask.png", mask), TileConfig())
    fractions = tissue_fractions(found.tissue_mask, reader.lattice.tile_origins(), reader)
    np.testing.assert_array_equal(fractions, wanted.reshape(-1))


@pytest.mark.parametrize(
    "mask",
    [
        np.full((HEIGHT, WIDTH), 7, np.uint8),
        np.array([[0, 1, 2]], np.uint8).repeat(HEIGHT, 0).repeat(214, 1)[:, :WIDTH],
        np.ones((HEIGHT, HEIGHT), np.uint8),  # of another shape
    ],
)
def test_a_mask_that_does_not_fit(reader: SlideReader, tmp_path: Path, mask: np.ndarray) -> None:
    path = save_mask(tmp_path / "wrong.png", mask)
    with pytest.raises(DataError, match=r"binary mask.*wrong\.png"):
        find_tissue(reader, path, TileConfig())


def test_an_empty_mask_is_not_an_error(reader: SlideReader, tmp_path: Path) -> None:
    path = save_mask(tmp_path / "empty.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    assert not find_tissue(reader, path, TileConfig()).tissue_mask.any()


def test_a_level_that_is_too_large_is_not_read(reader: SlideReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tissue, "MAX_LEVEL_PX", WIDTH * HEIGHT - 1)
    with pytest.raises(DataError, match="tissue_downsample"):
        find_tissue(reader, None, TileConfig())


def test_qc_drops_glass_ink_and_blur(tmp_path: Path) -> None:
    size = 256
    sharp = noise(size, size)
    sharp[::4] //= 3  # lines that survive the downsampling to the QC's spacing
    black, white, flat = (np.full((size, size, 3), colour, np.uint8) for colour in (5, 250, (180, 90, 200)))
    path = write_slide(tmp_path / "qc.tiff", [np.concatenate([sharp, black, white, flat], axis=1)], mpp=2.0)
    with SlideReader(path, Geometry(spacing_um=2.0, tile_size_px=size, region_cells=1)) as reader:
        kept = passes_qc(reader, reader.lattice.tile_origins(), TileConfig(qc=True))
        assert kept.tolist() == [True, False, False, False]
        assert passes_qc(reader, reader.lattice.tile_origins(), TileConfig()).all()


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"tissue_method": "magic"}, "tissue_method"),
        ({"tissue_downsample": 0}, "tissue_downsample"),
        ({"min_tissue": 1.5}, "min_t"),
    ],
)
def test_values_out_of_range(wrong: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        check_tissue_settings(TileConfig(**wrong))
