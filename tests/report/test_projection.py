"""Colours and neighbours against scikit-learn and brute force."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from dino.report import projection


@pytest.fixture
def features():
    return np.random.default_rng(3).normal(size=(60, 12)) * np.linspace(3, 1, 12) + 1.0


def test_colours_are_the_first_components(features):
    colours = projection.pca_rgb(features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scores = PCA(3, svd_solver="full").fit_transform(unit)
    assert colours.shape == (60, 3)
    assert colours.min() == 0.0
    assert colours.max() == 1.0
    inside = (colours > 0) & (colours < 1)
    for channel in range(3):
        kept = inside[:, channel]
        correlation = np.corrcoef(colours[kept, channel], scores[kept, channel])[0, 1]
        assert abs(correlation) == pytest.approx(1.0, abs=1e-9)


def test_colours_do_not_depend_on_the_signs_of_the_svd(features):
    turned = features @ np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]
    np.testing.assert_allclose(projection.pca_rgb(features), projection.pca_rgb(turned), atol=1e-8)


def test_constant_features_are_grey():
    assert (projection.pca_rgb(np.ones((5, 4))) == 0.5).all()


def test_fewer_dimensions_than_colours():
    assert projection.pca_rgb(np.random.default_rng(0).normal(size=(7, 2))).shape == (7, 3)


def test_neighbours_are_sorted_by_cosine_without_the_query(features):
    indices, similarity = projection.nearest_neighbours(features, 5, 4)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = sorted((i for i in range(60) if i != 5), key=lambda i: -(unit[i] @ unit[5]))[:4]
    assert indices.tolist() == expected
    assert (np.diff(similarity) <= 0).all()


def test_farthest_points_are_distinct_and_dissimilar():
    groups = np.repeat(np.eye(4), 5, axis=0) + np.random.default_rng(0).normal(size=(20, 4)) * 0.01
    chosen = projection.farthest_points(groups, 4)
    assert sorted(index // 5 for index in chosen) == [0, 1, 2, 3]
    assert len(projection.farthest_points(groups, 50)) == 20
