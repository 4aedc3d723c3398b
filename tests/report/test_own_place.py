"""The augmented tiles of self-retrieval, and the tiles and regions that a report uses."""

from pathlib import Path

import numpy as np
import torch

from dino.api.own_place import STAIN, cells_only, second_reading
from dino.report.slides import choose_regions
from dino.slides.tables import RegionRecord, TileRecord


class NoJitter:
    def uniform(self, low, high, shape):
        assert (low, high) == (-STAIN, STAIN)
        return np.zeros(shape)


def test_second_reading_is_a_quarter_turn():
    pixels = np.random.default_rng(0).integers(5, 250, (16, 16, 3), dtype=np.uint8)
    turned = second_reading(pixels, NoJitter())  # type: ignore[arg-type]
    expected = torch.from_numpy(pixels).permute(2, 0, 1).rot90(1, (1, 2))
    assert turned.dtype == torch.uint8
    assert (turned.int() - expected.int()).abs().max() <= 1


def test_second_reading_restains_a_little():
    pixels = np.full((8, 8, 3), (200, 120, 180), dtype=np.uint8)
    moved = second_reading(pixels, np.random.default_rng(1))[:, 0, 0].int() - torch.tensor([200, 120, 180])
    assert 0 < moved.abs().max() < 40
    again = second_reading(pixels, np.random.default_rng(1))[:, 0, 0].int() - torch.tensor([200, 120, 180])
    assert (moved == again).all()


def test_only_tiles_that_do_not_overlap_take_part():
    tiles = [TileRecord("s", x, y, 256, 0.5, 0.5, 1.0) for y in (0, 128, 256) for x in (0, 128, 256)]
    assert [(t.x, t.y) for t in cells_only(tiles)] == [(0, 0), (256, 0), (0, 256), (256, 256)]


def region(x, tissue):
    return RegionRecord("s", x, 0, 256, (4, 4), 0.5, Path("r.pt"), np.full((4, 4), tissue, dtype=np.float32))


def test_shown_regions_have_tissue_and_little_overlap():
    regions = [region(0, 0.5), region(1024, 0.9), region(1280, 0.89), region(4096, 0.1)]
    assert choose_regions(regions, 2) == [1, 0]
    assert choose_regions(regions, 9) == [1, 0, 2, 3]
    assert choose_regions([], 3) == []
