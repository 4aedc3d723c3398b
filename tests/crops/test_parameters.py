"""Drawn parameters against their documented distributions."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from dino.config.schema import PatchAugConfig
from dino.crops.parameters import JITTER_ORDERS, ViewDrawer, check_patch_aug, draw_boxes
from dino.errors import ConfigError
from dino.randomness import generator

DRAWS = 4000
MIN_P_VALUE = 1e-3  # of each test below; the seeds are fixed, so nothing here fails by chance
SETTINGS: dict[str, Any] = {
    "local_crops_size": 96,
    "local_crops_scale": [0.1, 0.4],
    "horizontal_flip": 0.5,
    "vertical_flip": 0.3,
    "quarter_turns": True,
    "hed_jitter": 0.5,
    "hed_strength": 0.05,
    "color_jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.2,
    "saturation": 1.5,
    "hue": 0.1,
    "grayscale": 0.2,
    "blur_local": 0.6,
    "blur_sigma": [0.1, 2.0],
    "solarize": 0.25,
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """A local view and the second global view of many tiles."""
    drawer = ViewDrawer(PatchAugConfig(**SETTINGS, local_crops_number=DRAWS))
    views = {name: value[2:] for name, value in drawer(512, 512, generator(3, 0, "crops")).items()}
    pair = ViewDrawer(PatchAugConfig(**SETTINGS, local_crops_number=0))
    second = [pair(512, 512, generator(3, d, "crops"))["solarize"] for d in range(DRAWS)]
    return {**views, "solarize": np.array(second)[:, 1], "solarize_first": np.array(second)[:, 0]}


def uniform_p(values: np.ndarray, low: float, high: float) -> float:
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue


def even_p(values: np.ndarray, choices: int) -> float:
    return stats.chisquare(np.bincount(values, minlength=choices)).pvalue


def test_box_areas_are_uniform_and_ratios_log_uniform(drawn):
    # In a large tile every attempt fits, and rounding to px does not show.
    box = draw_boxes(np.tile([[0.1, 0.4]], (DRAWS, 1)), 20000, 20000, generator(4, 0, "crops")).astype(float)
    assert uniform_p(box[:, 2] * box[:, 3] / 20000**2, 0.1, 0.4) > MIN_P_VALUE
    assert uniform_p(np.log(box[:, 3] / box[:, 2]), math.log(3 / 4), math.log(4 / 3)) > MIN_P_VALUE
    for corner, side in ((box[:, 0], box[:, 2]), (box[:, 1], box[:, 3])):
        assert uniform_p(corner / (20000 - side), 0, 1) > MIN_P_VALUE


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(256, 256, (0.4, 1.0)), (100, 180, (0.05, 0.9)), (7, 9, (0.05, 0.4))]
)
def test_boxes_have_the_distribution_of_torchvision(height, width, scale):
    # The reference runs torchvision's own code, rejected attempts included.
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(DRAWS)], dtype=float
    )
    ours = draw_boxes(np.tile([scale], (DRAWS, 1)), height, width, generator(5, 0, "crops")).astype(float)
    for quantity in (*range(4), "area", "ratio"):
        a, b = (
            {"area": x[:, 2] * x[:, 3], "ratio": x[:, 3] / x[:, 2]}[quantity]
            if isinstance(quantity, str)
            else x[:, quantity]
            for x in (ours, theirs)
        )
        assert stats.ks_2samp(a, b).pvalue > MIN_P_VALUE, quantity


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10), (1, 1), (3, 2)])
def test_narrow_tiles_get_the_central_box_of_torchvision(height, width):
    # In a tile this narrow, the full area does not fit at any ratio within 3/4 .. 4/3.
    if max(height, width) > 4:
        torch.manual_seed(0)
        expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
        boxes = draw_boxes(np.array([[1.0, 1.0]] * 20), height, width, generator(0, 0, "crops"))
        assert (boxes == np.array(expected)).all()
    for seed in range(20):
        top, left, h, w = draw_boxes(np.array([[0.05, 1.0]]), height, width, generator(seed, 0, "crops"))[0]
        assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0


@pytest.mark.parametrize(("name", "chance"), [("flip_x", 0.5), ("flip_y", 0.3), ("grayscale", 0.2), ("solarize", 0.25)])
def test_probabilities(drawn, name, chance):
    assert stats.binomtest(int(drawn[name].sum()), DRAWS, chance).pvalue > MIN_P_VALUE


def test_rotations_are_uniform(drawn):
    assert even_p(drawn["turns"], 4) > MIN_P_VALUE


def test_jitter_has_its_probability_and_every_order(drawn):
    on = drawn["jitter_order"] >= 0
    assert stats.binomtest(int(on.sum()), DRAWS, 0.8).pvalue > MIN_P_VALUE
    assert even_p(drawn["jitter_order"][on], 24) > MIN_P_VALUE
    assert sorted(Counter(map(tuple, JITTER_ORDERS.tolist()))) == sorted({tuple(o) for o in JITTER_ORDERS.tolist()})
    assert len({tuple(o) for o in JITTER_ORDERS.tolist()}) == 24


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("brightness", 0.6, 1.4), ("contrast", 0.8, 1.2), ("saturation", 0.0, 2.5), ("hue", -0.1, 0.1)],
)
def test_jitter_factors_are_uniform_and_neutral_when_off(drawn, name, low, high):
    on = drawn["jitter_order"] >= 0
    assert uniform_p(drawn[name][on], low, high) > MIN_P_VALUE
    assert (drawn[name][~on] == (0 if name == "hue" else 1)).all()


def test_stain_jitter(drawn):
    on = (drawn["hed_scale"] != 1).any(axis=1)
    assert stats.binomtest(int(on.sum()), DRAWS, 0.5).pvalue > MIN_P_VALUE
    for stain in range(3):
        assert uniform_p(drawn["hed_scale"][on, stain], 0.95, 1.05) > MIN_P_VALUE
        assert uniform_p(drawn["hed_shift"][on, stain], -0.05, 0.05) > MIN_P_VALUE
    assert (drawn["hed_shift"][~on] == 0).all()
    columns = np.concatenate([drawn["hed_scale"][on], drawn["hed_shift"][on]], axis=1)
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < 0.1


def test_blur(drawn):
    on = drawn["sigma"] > 0
    assert stats.binomtest(int(on.sum()), DRAWS, 0.6).pvalue > MIN_P_VALUE
    assert uniform_p(drawn["sigma"][on], 0.1, 2.0) > MIN_P_VALUE


def test_parameters_depend_only_on_seed_and_draw():
    drawer = ViewDrawer(PatchAugConfig(**SETTINGS))
    again = [drawer(256, 224, generator(1, 7, "crops")) for _ in range(2)]
    other = drawer(256, 224, generator(1, 8, "crops"))
    for name, value in again[0].items():
        assert np.array_equal(value, again[1][name]), name
    assert not np.array_equal(again[0]["box"], other["box"])


def test_changing_one_probability_does_not_change_other_parameters():
    changed = {**SETTINGS, "solarize": 1.0, "color_jitter": 0.0, "blur_local": 0.0, "blur_global": [0.0, 0.0]}
    a, b = (ViewDrawer(PatchAugConfig(**s))(256, 256, generator(0, 0, "crops")) for s in (SETTINGS, changed))
    for name in ("box", "flip_x", "flip_y", "turns", "hed_scale", "hed_shift", "grayscale"):
        assert np.array_equal(a[name], b[name]), name


def test_only_the_second_global_view_is_solarized(drawn):
    assert not drawn["solarize_first"].any()
    views = ViewDrawer(PatchAugConfig(solarize=1.0))(256, 256, generator(0, 0, "crops"))
    assert views["solarize"].tolist() == [False, True] + [False] * 8


def test_blur_differs_between_the_views():
    aug = PatchAugConfig(blur_global=[1.0, 0.0], blur_local=0.0)
    assert (ViewDrawer(aug)(256, 256, generator(0, 0, "crops"))["sigma"] > 0).tolist() == [True] + [False] * 9
    aug = PatchAugConfig(blur_global=[0.0, 0.0], blur_local=1.0)
    assert (ViewDrawer(aug)(256, 256, generator(0, 0, "crops"))["sigma"] > 0).tolist() == [False] * 2 + [True] * 8


def test_global_and_local_views_have_their_own_scale():
    aug = PatchAugConfig(global_crops_scale=[0.5, 0.6], local_crops_scale=[0.1, 0.2])
    box = ViewDrawer(aug)(2000, 2000, generator(0, 0, "crops"))["box"]
    area = box[:, 2] * box[:, 3] / 2000**2
    assert ((area[:2] > 0.499) & (area[:2] < 0.601)).all() and ((area[2:] > 0.099) & (area[2:] < 0.201)).all()


def test_views_have_the_documented_types():
    views = ViewDrawer(PatchAugConfig(**SETTINGS))(256, 256, generator(0, 0, "crops"))
    assert {k: (str(v.dtype), v.shape) for k, v in views.items()} == {
        "box": ("int64", (10, 4)),
        "flip_x": ("bool", (10,)),
        "flip_y": ("bool", (10,)),
        "turns": ("int64", (10,)),
        "hed_scale": ("float32", (10, 3)),
        "hed_shift": ("float32", (10, 3)),
        "jitter_order": ("int64", (10,)),
        "brightness": ("float32", (10,)),
        "contrast": ("float32", (10,)),
        "saturation": ("float32", (10,)),
        "hue": ("float32", (10,)),
        "grayscale": ("bool", (10,)),
        "sigma": ("float32", (10,)),
        "solarize": ("bool", (10,)),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_crops_scale": [0.5, 0.4]},
        {"local_crops_scale": [0.0, 0.4]},
        {"global_crops_scale": [0.5, 1.4]},
        {"global_crops_scale": [0.5]},
        {"local_crops_size": 0},
        {"local_crops_number": -1},
        {"blur_local": 1.5},
        {"blur_global": [0.5, -0.1]},
        {"blur_sigma": [0.0, 1.0]},
        {"hue": 0.6},
        {"brightness": -0.1},
        {"solarize": float("nan")},
    ],
)
def test_the_error_for_an_invalid_setting_names_it(wrong):
    with pytest.raises(ConfigError, match=f"aug.{next(iter(wrong))}"):
        check_patch_aug(PatchAugConfig(**wrong))
