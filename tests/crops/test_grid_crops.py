"""Crops of feature grids: exact copies of cells; sizes, flips, rotations and tissue as documented."""

import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from dino.config.schema import RegionAugConfig
from dino.crops.grids import GridCrops, crop_side
from dino.errors import ConfigError, DataError
from dino.randomness import generator


def apply(crops: GridCrops, grids: torch.Tensor, tissue=None, seed: int = 0):
    shape = (grids.shape[2], grids.shape[3])
    drawn = [crops.draw(shape, tissue, generator(seed, row, "crops")) for row in range(len(grids))]
    parameters = {k: torch.from_numpy(np.stack([d[k] for d in drawn])) for k in drawn[0]}
    return parameters, crops.apply(grids.flatten(2).transpose(1, 2), parameters)  # as (B, h * w, D) cells


@pytest.mark.parametrize(
    ("cells", "large", "small"), [(4, 3, 2), (5, 4, 2), (6, 5, 2), (8, 7, 3), (11, 10, 4), (16, 14, 6), (32, 28, 12)]
)
def test_sizes(cells, large, small):
    assert GridCrops((cells, cells)).sizes == [(large, large), (small, small)]


def test_crops_of_rectangular_grids_are_rectangular():
    crops = GridCrops((8, 16), RegionAugConfig(local_crops_number=3))
    assert crops.sizes == [(7, 14), (3, 6)]
    assert crops.groups == [2, 3]
    _, (large, small) = apply(crops, torch.zeros(2, 5, 8, 16))
    assert large.shape == (2, 2, 5, 7, 14)
    assert small.shape == (3, 2, 5, 3, 6)


def test_no_local_crops():
    crops = GridCrops((8, 8), RegionAugConfig(local_crops_number=0))
    assert crops.groups == [2]
    assert len(apply(crops, torch.zeros(1, 2, 8, 8))[1]) == 1


def test_crop_side_is_clamped():
    assert [crop_side(10, s, 2, 9) for s in (0.01, 0.5, 1.0)] == [2, 5, 9]


@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cells_are_copied_exactly(size, turns, dtype):
    grids = torch.randn(6, 4, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    parameters, groups = apply(GridCrops(size, RegionAugConfig(quarter_turns=turns)), grids)
    views = [view for group in groups for view in group]
    for number, view in enumerate(views):
        for row, found in enumerate(view):
            drawn = {name: value[row, number] for name, value in parameters.items()}
            top, left, height, width = drawn["box"].tolist()
            expected = grids[row, :, top : top + height, left : left + width]
            expected = expected.flip([-1] * bool(drawn["flip_x"]) + [-2] * bool(drawn["flip_y"]))
            assert torch.equal(found, torch.rot90(expected, int(drawn["turns"]), (-2, -1)))
    seen = set(parameters["turns"].flatten().tolist())
    assert seen == (({0, 1, 2, 3} if size[0] == size[1] else {0, 2}) if turns else {0})


def test_positions_flips_and_rotations_are_uniform():
    crops = GridCrops((16, 16), RegionAugConfig(quarter_turns=True, horizontal_flip=0.5, vertical_flip=0.2))
    drawn = [crops.draw((16, 16), None, generator(0, d, "crops")) for d in range(600)]
    box = np.stack([d["box"] for d in drawn])
    for views, places in ((slice(0, 2), 3), (slice(2, None), 11)):
        for axis in range(2):
            counts = np.bincount(box[:, views, axis].ravel(), minlength=places)
            assert len(counts) == places
            assert stats.chisquare(counts).pvalue > 1e-3
    for name, chance in (("flip_x", 0.5), ("flip_y", 0.2)):
        flips = np.stack([d[name] for d in drawn])
        assert stats.binomtest(int(flips.sum()), flips.size, chance).pvalue > 1e-3
    assert stats.chisquare(np.bincount(np.stack([d["turns"] for d in drawn]).ravel(), minlength=4)).pvalue > 1e-3


def tissue_fraction(tissue: np.ndarray, box: np.ndarray) -> float:
    top, left, height, width = box
    return float((tissue[top : top + height, left : left + width] >= 0.25).mean())


def test_global_crops_are_redrawn_until_a_quarter_of_their_cells_has_tissue():
    tissue = np.zeros((16, 16))
    tissue[:8, :8] = 0.3
    with_tissue = GridCrops((16, 16), RegionAugConfig(global_crops_scale=0.5, min_tissue=0.25))
    without = GridCrops((16, 16), RegionAugConfig(global_crops_scale=0.5, redraws=0))
    shares = {
        name: [
            tissue_fraction(tissue, box)
            for d in range(200)
            for box in crops.draw((16, 16), tissue, generator(0, d, "crops"))["box"][:2]
        ]
        for name, crops in {"with": with_tissue, "without": without}.items()
    }
    chance = np.mean(np.array(shares["without"]) >= 0.25)  # of one draw
    expected = 1 - (1 - chance) ** 11
    found = np.array(shares["with"]) >= 0.25
    assert stats.binomtest(int(found.sum()), len(found), expected).pvalue > 1e-3
    assert 0.1 < chance < 0.6  # so that a redraw makes a difference


def test_the_crop_with_the_most_tissue_is_used_if_none_has_enough():
    tissue = np.zeros((16, 16))
    tissue[0, 0] = 1.0
    crops = GridCrops((16, 16))
    boxes = np.concatenate([crops.draw((16, 16), tissue, generator(0, d, "crops"))["box"][:2] for d in range(100)])
    hit = np.mean([tissue_fraction(tissue, box) > 0 for box in boxes])
    assert hit == pytest.approx(1 - (8 / 9) ** 11, abs=0.12)  # 1/9 of the positions contain this cell


def test_unknown_tissue_and_full_tissue_give_the_same_crops():
    crops = GridCrops((16, 16))
    a, b = (crops.draw((16, 16), t, generator(0, 5, "crops")) for t in (None, np.ones((16, 16))))
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_a_sample_does_not_depend_on_its_batch():
    crops = GridCrops((6, 6), RegionAugConfig(quarter_turns=True))
    grids = torch.randn(4, 3, 6, 6)
    parameters, together = apply(crops, grids)
    for row in range(4):
        cells = grids[row : row + 1].flatten(2).transpose(1, 2)
        alone = crops.apply(cells, {k: v[row : row + 1] for k, v in parameters.items()})
        assert all(torch.equal(a[:, row : row + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_crops_of_row_numbers_equal_those_of_cells(dtype):
    cells = torch.randn(9, 30, 4, generator=torch.Generator().manual_seed(0)).to(dtype)  # nine grids of 5 x 6
    rows = torch.tensor([7, 0, 7, 3])
    crops, by_row = GridCrops((5, 6)), GridCrops((5, 6), cells=cells)
    parameters, expected = apply(crops, cells[rows].transpose(1, 2).unflatten(2, (5, 6)))
    found = by_row.apply(rows, parameters)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(found, expected, strict=True))
    with pytest.raises(DataError, match="found row numbers"):
        crops.apply(rows, parameters)
    assert pickle.loads(pickle.dumps(by_row)).cells is None  # workers only draw parameters


def test_the_memory_layout_is_that_of_the_region_vits_input():
    _, groups = apply(GridCrops((8, 8)), torch.randn(3, 5, 8, 8))
    for views in groups:
        assert views.flatten(0, 1).permute(0, 2, 3, 1).is_contiguous()


def test_views_keep_their_values_while_they_exist():
    crops, grids = GridCrops((8, 8)), torch.randn(8, 4, 5, 8, 8)
    held = [apply(crops, batch)[1][0][1] for batch in grids]  # of each batch one view of the larger size
    expected = [apply(GridCrops((8, 8)), batch)[1][0][1].clone() for batch in grids]
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
    address = held.pop().untyped_storage().data_ptr()
    taken = {view.untyped_storage().data_ptr() for view in apply(crops, grids[0])[1]}
    assert address in taken and not taken & {view.untyped_storage().data_ptr() for view in held}


def test_wrong_grids_are_rejected():
    with pytest.raises(ConfigError, match="at least 4 x 4"):
        GridCrops((3, 16))
    with pytest.raises(DataError, match="8 x 8 cells, found 8 x 9"):
        GridCrops((8, 8)).draw((8, 9), None, generator(0, 0, "crops"))


@pytest.mark.parametrize(
    "wrong", [{"global_crops_scale": 0.0}, {"min_tissue": 1.1}, {"redraws": -1}, {"vertical_flip": 2}]
)
def test_the_error_for_an_invalid_setting_names_it(wrong):
    with pytest.raises(ConfigError, match=f"aug.{next(iter(wrong))}"):
        GridCrops((8, 8), RegionAugConfig(**wrong))
