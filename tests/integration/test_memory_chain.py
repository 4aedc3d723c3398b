"""Tiling and extraction of many slides: resident memory and open files stay as they are after the first few."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from painted_slide import halved, noise, write_slide
from tiny_models import mean_colour

from dino.api import extracting
from dino.api.extracting import extract
from dino.api.tiling import tile
from dino.config.schema import ExtractConfig, TileConfig
from dino.extraction import tiles
from dino.slides import tiling

FEW, MANY = 16, 50
WARM = 8  # slides after which caches are full
SPARE_MB = 24  # what all slides after those may add
SPARE_FILES = 2  # a lock's heartbeat opens its file for a moment
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


def resident_mb() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Watch:
    """Calls a function, and notes memory and open files after each time."""

    def __init__(self, honest: Callable) -> None:
        self.honest, self.megabytes, self.files = honest, [], []

    def __call__(self, *args: object, **kwargs: object) -> object:
        result = self.honest(*args, **kwargs)
        self.megabytes.append(resident_mb())
        self.files.append(len(os.listdir("/proc/self/fd")))
        return result

    def assert_flat(self, count: int) -> None:
        """No more files, and hardly more memory, than after the first few slides."""
        grown = max(self.megabytes[WARM:]) - max(self.megabytes[:WARM])
        print(f"after {WARM} of {count} slides: {grown:+.1f} MB, files {min(self.files)} to {max(self.files)}")
        assert len(self.megabytes) == count
        assert grown < SPARE_MB, self.megabytes
        assert max(self.files[WARM:]) <= max(self.files[:WARM]) + SPARE_FILES, self.files


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_many_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    pixels = noise(1034, 782)
    slide = write_slide(tmp_path / "slide.tiff", [pixels, halved(pixels)])
    (tmp_path / "slides").mkdir()
    for number in range(count):
        (tmp_path / "slides" / f"slide_{number}.tiff").symlink_to(slide)
    watch = Watch(tiling._report)
    monkeypatch.setattr(tiling, "_report", watch)
    config = TileConfig(tile_size_px=64, region_size_px=256, num_workers=1)
    assert tile([tmp_path / "slides"], tmp_path / "root", config).tiles == count * 192
    watch.assert_flat(count)
    watch = Watch(tiles.write_regions)
    monkeypatch.setattr(tiles, "write_regions", watch)
    monkeypatch.setattr(extracting, "load_backbone_file", lambda *args, **kwargs: mean_colour())
    config = ExtractConfig(device="cpu", precision="fp32", batch_size=16, num_workers=2)
    assert extract("RUN", tmp_path / "root", config).written == count * 13
    watch.assert_flat(count)
