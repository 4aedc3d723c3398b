from itertools import pairwise

import numpy as np
import pytest
import torch

from dino.config.schema import ObjectiveConfig, RegionAugConfig
from dino.crops.grids import GridCrops
from dino.crops.masks import MaskDrawer
from dino.errors import ConfigError
from dino.randomness import generator

SIZE = (14, 14)


def drawn(settings: ObjectiveConfig, count: int = 200, size: tuple[int, int] = SIZE) -> np.ndarray:
    drawer = MaskDrawer(settings, size)
    return np.stack([drawer({}, None, generator(0, draw, "masks")) for draw in range(count)])  # (n, G, N)


@pytest.mark.parametrize("shape", ["blocks", "squares", "random"])
def test_ratio_and_probability_are_those_that_were_asked_for(shape: str) -> None:
    masks = drawn(ObjectiveConfig(mask_shape=shape))
    per_view = masks.sum(-1)
    assert ((per_view > 0).sum(1) == 1).all()  # exactly one of the two views
    assert 0.35 < (per_view[:, 0] > 0).mean() < 0.65
    masked = per_view[per_view > 0] / masks.shape[-1]
    assert masked.min() >= 0.1 - 1 / 196 and masked.max() <= 0.5 + 1 / 196
    counts, _ = np.histogram(masked, bins=4, range=(0.1, 0.5))
    assert (counts > 0.15 * len(masked)).all()  # spread evenly


@pytest.mark.parametrize(("probability", "expected"), [(0.25, (0, 1)), (0.75, (1, 2)), (1.0, (2, 2))])
def test_views_of_a_sample_are_chosen_together(probability: float, expected: tuple[int, int]) -> None:
    views = (drawn(ObjectiveConfig(mask_probability=probability)).sum(-1) > 0).sum(1)
    assert set(views.tolist()) <= set(expected)
    assert abs(views.mean() / 2 - probability) < 0.06


def test_blocks_are_contiguous_and_squares_square() -> None:
    """Neighbours of a masked token are masked more often than by chance."""

    def neighbours(shape: str) -> float:
        masks = drawn(ObjectiveConfig(mask_shape=shape, mask_ratio=[0.3, 0.3])).reshape(-1, *SIZE)
        masks = masks[masks.any((1, 2))]
        return float((masks[:, 1:] & masks[:, :-1]).sum() / masks[:, :-1].sum())

    assert neighbours("random") < 0.35
    assert min(neighbours("blocks"), neighbours("squares")) > 0.6


def test_a_draw_is_a_function_of_its_number() -> None:
    settings = ObjectiveConfig()
    assert np.array_equal(drawn(settings, 5), drawn(settings, 5))
    assert all(not np.array_equal(a, b) for a, b in pairwise(drawn(settings, 5)))


def test_only_cells_with_tissue_are_masked_and_of_them_the_ratio_is_taken() -> None:
    crops = GridCrops((8, 8), RegionAugConfig(quarter_turns=True))
    tissue = np.zeros((8, 8))
    tissue[:5, 3:] = 0.9
    drawer = MaskDrawer(
        ObjectiveConfig(mask_ratio=[0.5, 0.5], mask_probability=1.0), crops.sizes[0], crops.tissue_cells
    )
    # The same crops of a grid whose only channel is the tissue are the expected places.
    cells = torch.from_numpy(tissue).reshape(1, 64, 1)
    for draw in range(30):
        parameters = crops.draw((8, 8), tissue, generator(0, draw, "crops"))
        views = crops.apply(cells, {name: torch.from_numpy(np.array(x))[None] for name, x in parameters.items()})[0]
        expected = views[:2, 0, 0].numpy() > 0.25  # (G, s, s)
        mask = drawer(parameters, tissue, generator(0, draw, "masks")).reshape(expected.shape)
        assert np.array_equal(crops.tissue_cells(parameters, tissue), expected)
        assert not (mask & ~expected).any()
        assert mask.sum((1, 2)).tolist() == [round(0.5 * int(view.sum())) for view in expected]


def test_bad_settings_are_refused() -> None:
    for changes in (
        {"mask_shape": "stars"},
        {"mask_ratio": [0.5, 0.1]},
        {"mask_ratio": [0.0, 0.1]},
        {"mask_probability": 0.0},
    ):
        with pytest.raises(ConfigError, match="objective.mask"):
            MaskDrawer(ObjectiveConfig(**changes), SIZE)
    with pytest.raises(ConfigError, match="at least one token"):
        MaskDrawer(ObjectiveConfig(), (2, 2))
