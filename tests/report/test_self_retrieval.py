"""The tiles of self-retrieval and their augmentation."""

import numpy as np
import torch

from dino.report.self_retrieval import STAIN, cells_only, second_reading
from dino.slides.tables import TileRecord


class NoJitter:
    def uniform(self, low, high, shape):
        assert (low, high) == (-STAIN, STAIN)
        return np.zeros(shape)


def test_second_reading_is_rotated_by_90_degrees():
    pixels = np.random.default_rng(0).integers(5, 250, (16, 16, 3), dtype=np.uint8)
    turned = second_reading(pixels, NoJitter())  # type: ignore[arg-type]
    expected = torch.from_numpy(pixels).permute(2, 0, 1).rot90(1, (1, 2))
    assert turned.dtype == torch.uint8
    assert (turned.int() - expected.int()).abs().max() <= 1


def test_second_reading_has_jittered_stain():
    pixels = np.full((8, 8, 3), (200, 120, 180), dtype=np.uint8)
    moved = second_reading(pixels, np.random.default_rng(1))[:, 0, 0].int() - torch.tensor([200, 120, 180])
    assert 0 < moved.abs().max() < 40
    again = second_reading(pixels, np.random.default_rng(1))[:, 0, 0].int() - torch.tensor([200, 120, 180])
    assert (moved == again).all()


def test_only_tiles_on_the_lattice_are_used():
    tiles = [TileRecord("s", x, y, 256, 0.5, 0.5, 1.0) for y in (0, 128, 256) for x in (0, 128, 256)]
    assert [(t.x, t.y) for t in cells_only(tiles)] == [(0, 0), (256, 0), (0, 256), (256, 256)]
