import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from dino.evaluate.confounders import design
from dino.report import robustness
from dino.report.projection import pca
from dino.report.robustness import Shown, robustness_figure


def rows(classes, values, count=240):
    label, value = np.arange(count) % classes, np.arange(count) // classes % values
    names = [f"class {i}" for i in label], [f"lab {i}" for i in value]
    return design("scanner", *names, [str(i) for i in range(count)])


def drawn_texts(monkeypatch, shown, found):
    """The figure's size in px, and the texts in it."""
    texts, save = [], Figure.savefig

    def spy(figure, *arguments, **settings):
        texts.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", spy)
        with Image.open(io.BytesIO(robustness_figure(shown, found))) as picture:
            return picture.size, texts


def test_the_figure_has_a_bar_per_entry_and_maps_of_those_with_features(monkeypatch):
    features = np.random.default_rng(0).normal(size=(240, 6))
    shown = [
        Shown("runs/ours", [0.3, 0.4, 0.2, 0.1], features),
        Shown("a model of a very long name, of which only the end is shown", [0.25] * 4, features),
        Shown("chance", [0.1, 0.2, 0.3, 0.4]),
    ]
    size, texts = drawn_texts(monkeypatch, shown, rows(3, 2))
    bare, _ = drawn_texts(monkeypatch, shown[2:], rows(3, 2))
    assert size[0] == bare[0] == 11 * robustness.DPI
    assert size[1] > 2 * bare[1]
    assert {"runs/ours", "runs/ours, by label", "by scanner", "chance", "class 2", "lab 1", "40%"} <= set(texts)
    assert {"same class, other scanner", "other class, same scanner"} <= set(texts)
    assert texts.count("by scanner") == 2
    assert all(len(text) <= robustness.NAME_LETTERS for text in texts if "model of a" in text)


@pytest.mark.parametrize(("classes", "values", "dimensions"), [(20, 2, 3), (2, 15, 1), (9, 9, 40)])
def test_many_classes_and_few_dimensions_are_drawn(monkeypatch, classes, values, dimensions):
    features = np.random.default_rng(0).normal(size=(1800, dimensions))
    _, texts = drawn_texts(monkeypatch, [Shown("m", [0.25] * 4, features)], rows(classes, values, 1800))
    more = max(classes, values) - robustness.NAMED
    assert (f"and {more} more" in texts) == (more > 0)


def test_principal_components_are_those_of_the_covariance():
    features = np.random.default_rng(0).normal(size=(50, 5)) * [3, 2, 1, 1, 1]
    points, fractions = pca(features, 2)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(unit.T))
    expected = (unit - unit.mean(0)) @ vectors[:, ::-1][:, :2]
    assert np.allclose(np.abs(points), np.abs(expected))
    assert np.allclose(fractions, values[::-1][:2] / values.sum())
    assert ((points**3).sum(0) >= 0).all()


def test_equal_features_have_components_of_zero():
    points, fractions = pca(np.ones((4, 3)), 5)
    assert points.shape == (4, 5) and not points.any() and not fractions.any()
