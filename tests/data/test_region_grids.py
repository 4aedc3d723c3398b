"""Feature grids that are cut from files of features of tiles, against a plain search and read cell by cell."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dino.data.grids import read_grid
from dino.data.region_grids import complete_regions, lattice, open_regions
from dino.errors import DataError

STEP, ORIGIN, DIM = 512, (1024, 256), 3


def write(path: Path, cells: np.ndarray, seed: int = 0, **attributes: object) -> dict[tuple[int, int], np.ndarray]:
    """A file as TRIDENT writes it, of the cells (H, W) that are True, in a random order.

    Returns:
        The features by row and column.
    """
    generator = np.random.default_rng(seed)
    places = np.argwhere(cells)[generator.permutation(np.count_nonzero(cells))]
    features = generator.standard_normal((len(places), DIM)).astype(np.float16)
    with h5py.File(path, "w") as file:
        file["features"] = features
        file["coords"] = places[:, ::-1] * STEP + ORIGIN
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": STEP, "overlap": 0, **attributes})
    return {(int(y), int(x)): one for (y, x), one in zip(places, features, strict=True)}


@pytest.mark.parametrize("seed", range(4))
def test_regions_are_complete_apart_and_as_many_as_an_offset_allows(seed: int) -> None:
    cells = np.random.default_rng(seed).random((19, 23)) < 0.97
    places = np.argwhere(cells)
    found = complete_regions(lattice(places[:, ::-1] * STEP + ORIGIN, STEP), 4)
    taken = places[found].reshape(-1, 4, 4, 2)
    assert len({tuple(one) for one in taken.reshape(-1, 2).tolist()}) == taken.size // 2  # no tile twice
    corner = taken[:, :1, :1]
    assert np.array_equal(taken - corner, np.broadcast_to(np.stack(np.mgrid[:4, :4], -1), taken.shape))
    most = max(
        sum(cells[i : i + 4, j : j + 4].all() for i in range(y, 16, 4) for j in range(x, 20, 4))
        for y in range(4)
        for x in range(4)
    )
    assert len(found) == most > 0


def test_grids_hold_the_features_of_their_places(tmp_path: Path) -> None:
    cells = np.ones((9, 14), bool)
    cells[0, 2] = cells[8, 3] = False
    features = write(tmp_path / "s.h5", cells)
    regions = open_regions(tmp_path / "s.h5", 4)
    assert regions.shape == (len(regions), 16, DIM) and len(regions) == 5
    firsts = set()
    for number in range(5):
        grid = read_grid(tmp_path / "s.h5", "yx", (4, 4), number)
        assert grid.dtype == torch.float32 and grid.shape == (DIM, 4, 4)
        first = next(place for place, one in features.items() if np.array_equal(one.astype(np.float32), grid[:, 0, 0]))
        for i in range(4):
            for j in range(4):
                assert np.array_equal(grid[:, i, j], features[first[0] + i, first[1] + j].astype(np.float32))
        firsts.add(first)
    assert len(firsts) == 5


def test_a_slide_that_is_too_small_or_has_no_tiles_has_no_region(tmp_path: Path) -> None:
    for name, cells in (("small", np.ones((3, 9), bool)), ("empty", np.zeros((9, 9), bool))):
        write(tmp_path / f"{name}.h5", cells)
        assert open_regions(tmp_path / f"{name}.h5", 4).shape == (0, 16, DIM)


def test_what_forms_no_lattice_is_refused(tmp_path: Path) -> None:
    path, cells = tmp_path / "s.h5", np.ones((5, 5), bool)
    write(path, cells, overlap=64)
    with pytest.raises(DataError, match="expected tiles without overlap .* found overlap=64"):
        open_regions(path, 4)
    write(path, cells)
    with h5py.File(path, "r+") as file:
        del file["coords"].attrs["patch_size_level0"]
    with pytest.raises(DataError, match="expected the attribute patch_size_level0"):
        open_regions(path, 4)
    write(path, cells)
    with h5py.File(path, "r+") as file:
        file["coords"][7] += 100
    with pytest.raises(DataError, match="expected tiles on one lattice of 512 px, found 1 of 25"):
        open_regions(path, 4)
    with h5py.File(path, "r+") as file:
        file["coords"][7] = file["coords"][8]
    with pytest.raises(DataError, match="found two with the same coordinates"):
        open_regions(path, 4)
