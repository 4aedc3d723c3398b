"""The lattice, against brute force over pixels."""

import math

import numpy as np
import pytest

from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError
from dino.slides.lattice import Geometry, Lattice, Pyramid, cells_of_region, cells_per_side, plan_lattice


def lattice(
    width: int, height: int, *, spacing: float = 0.5, levels: tuple[float, ...] = (1.0,), **geometry
) -> Lattice:
    pyramid = Pyramid(spacing, [(int(width / d), int(height / d)) for d in levels], levels)
    return plan_lattice(pyramid, Geometry(**geometry), "slide")


def brute_force_origins(size: int, step: int, k: int) -> list[int]:
    """Every position i * step + round(j * step / k) from which a tile fits, found by trying every pixel."""
    allowed = {i * step + int(np.floor(j * step / k + 0.5)) for i in range(size) for j in range(k)}
    return [x for x in range(size) if x in allowed and x + step <= size]


@pytest.mark.parametrize("size", [(64, 64), (63, 200), (257, 131)])
@pytest.mark.parametrize(("overlap", "k"), [(0.0, 1), (0.5, 2), (2 / 3, 3), (0.667, 3), (0.75, 4)])
def test_tiles_are_all_positions_that_fit(size: tuple[int, int], overlap: float, k: int) -> None:
    found = lattice(*size, tile_size_px=50, overlap=overlap, region_cells=1).tile_origins()
    xs, ys = (brute_force_origins(length, 50, k) for length in size)
    assert [tuple(p) for p in found] == [(x, y) for y in ys for x in xs]


@pytest.mark.parametrize(("n", "shared"), [(1, 0), (3, 0), (3, 1), (3, 2), (4, 3)])
def test_regions_are_inside_and_overlap_by_the_requested_cells(n: int, shared: int) -> None:
    place = lattice(700, 500, tile_size_px=50, region_cells=n, region_overlap_cells=shared)
    regions = place.region_origins()
    counts = np.zeros((500, 700), dtype=int)  # how many regions cover each pixel
    for x, y in regions:
        assert x % 50 == 0 and y % 50 == 0
        assert x + n * 50 <= 700 and y + n * 50 <= 500
        counts[y : y + n * 50, x : x + n * 50] += 1
    stride = n - shared
    assert len(regions) == len(range(0, 14 - n + 1, stride)) * len(range(0, 10 - n + 1, stride))
    assert counts.max() == math.ceil(n / stride) ** 2


@pytest.mark.parametrize("wanted", [{}, {"overlap": 0.5}, {"overlap": 0.75}])
@pytest.mark.parametrize(("spacing", "levels"), [(0.5, (1.0,)), (0.25, (1.0, 4.0007)), (0.3, (1.0, 2.0031))])
def test_every_cell_of_a_region_is_a_tile(spacing: float, levels: tuple[float, ...], wanted: dict) -> None:
    place = lattice(4001, 3011, spacing=spacing, levels=levels, tile_size_px=64, region_cells=3, **wanted)
    tiles = {tuple(p) for p in place.tile_origins()}
    regions = place.region_origins()
    assert len(regions) > 4
    for x, y in regions:
        assert {tuple(p) for p in place.cells_of_region(x, y)} <= tiles


def test_cells_of_a_region_are_row_major() -> None:
    assert cells_of_region(100, 7, 10, (2, 3)).tolist() == [
        [100, 7], [110, 7], [120, 7],
        [100, 17], [110, 17], [120, 17],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spacing", "levels", "wanted", "level", "read", "step", "actual"),
    [
        (0.499, (1.0,), 0.5, 0, 256, 256, 0.499),  # within the tolerance: not resampled
        (0.25, (1.0, 2.0), 0.5, 1, 256, 512, 0.5),  # a level with this spacing
        (0.25, (1.0, 4.0), 0.5, 0, 512, 512, 0.5),  # resampled from the finer level
        (
            0.5,
            (1.0, 4.0),
            0.7,
            0,
            358,
            358,
            0.5 * 358 / 256,
        ),  # the actual spacing follows from the integer number of pixels
        (0.24, (1.0, 2.0), 0.5, 1, 256, 512, 0.48),
    ],
)
def test_level_size_and_spacing(spacing, levels, wanted, level, read, step, actual) -> None:
    place = lattice(9000, 9000, spacing=spacing, levels=levels, spacing_um=wanted)
    assert (place.read_level, place.read_size_px, place.step_lv0) == (level, read, step)
    assert place.spacing_um == pytest.approx(actual)


def test_reads_stay_inside_their_level() -> None:
    # A level whose size was rounded down: the last column fits at level 0 but not at this level.
    place = plan_lattice(
        Pyramid(0.25, [(256, 256), (127, 128)], [1.0, 2.0]), Geometry(tile_size_px=64, region_cells=1), "s"
    )
    assert (place.columns, place.rows) == (1, 2)


def test_a_slide_smaller_than_a_region_has_tiles_only() -> None:
    place = lattice(600, 600, region_cells=16)
    assert len(place.region_origins()) == 0
    assert len(place.tile_origins()) == 4


def test_a_coarser_slide_is_rejected_by_name() -> None:
    assert lattice(600, 600, spacing=0.52).step_lv0 == 256
    with pytest.raises(DataError, match=r"'slide'.*0\.53"):
        lattice(600, 600, spacing=0.53)


@pytest.mark.parametrize(
    "wrong",
    [
        {"overlap": 0.3}, {"overlap": -0.5}, {"overlap": 1.0}, {"spacing_um": 0.0}, {"tile_size_px": 0},
        {"region_cells": 4, "region_overlap_cells": 4}, {"region_overlap_cells": -1}, {"tolerance": 0.5},
    ],
)  # fmt: skip
def test_invalid_geometries_are_rejected(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=list(wrong)[-1]):
        Geometry(**wrong)


def test_the_region_size_must_be_a_multiple_of_the_tile_size() -> None:
    assert cells_per_side(4096, 256) == 16
    with pytest.raises(ConfigError, match="1024 and 1280"):
        cells_per_side(1100, 256)
    with pytest.raises(ConfigError, match="multiple"):
        cells_per_side(128, 256)


def test_the_geometry_of_settings() -> None:
    assert Geometry.of(TileConfig()) == Geometry()
    config = TileConfig(0.7, 64, 0.5, 320, 2, tolerance=0.01)
    assert Geometry.of(config) == Geometry(0.7, 64, 0.5, region_cells=5, region_overlap_cells=2, tolerance=0.01)
    with pytest.raises(ConfigError, match="region_overlap_cells"):
        Geometry.of(TileConfig(region_overlap_cells=16))
