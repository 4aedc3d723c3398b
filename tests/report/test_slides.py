"""The regions that a report shows."""

from pathlib import Path

import numpy as np

from dino.report.slides import choose_regions
from dino.slides.tables import RegionRecord


def region(x, tissue):
    return RegionRecord("s", x, 0, 256, (4, 4), 0.5, Path("r.pt"), np.full((4, 4), tissue, dtype=np.float32))


def test_shown_regions_have_tissue_and_little_overlap():
    regions = [region(0, 0.5), region(1024, 0.9), region(1280, 0.89), region(4096, 0.1)]
    assert choose_regions(regions, 2) == [1, 0]
    assert choose_regions(regions, 9) == [1, 0, 2, 3]
    assert choose_regions([], 3) == []
