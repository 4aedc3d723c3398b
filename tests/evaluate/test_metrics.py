import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from dino.evaluate.metrics import accuracy, auc, balanced_accuracy


def case(classes, rows, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=rows)
    probabilities = rng.dirichlet(np.ones(classes), size=rows).round(1) + 0.01  # rounding makes ties
    return truth, probabilities / probabilities.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [3, 5])
def test_agrees_with_scikit_learn(classes):
    truth, probabilities = case(classes, 200, classes)
    predicted = probabilities.argmax(1)
    assert accuracy(truth, predicted) == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert balanced_accuracy(truth, predicted) == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(truth, predicted)
    )
    wanted = sklearn_metrics.roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    assert auc(truth, probabilities) == pytest.approx(wanted, abs=1e-12)


def test_binary_auc_is_that_of_the_positive_class():
    truth, probabilities = case(2, 100, 0)
    assert auc(truth, probabilities) == pytest.approx(sklearn_metrics.roc_auc_score(truth, probabilities[:, 1]))
    assert auc([0, 0, 1, 1], [[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]]) == 0.75  # 3 of 4 pairs in order


def test_a_class_without_queries_is_left_out():
    truth, probabilities = case(4, 120, 3)
    keep = truth != 2
    wanted = np.mean([sklearn_metrics.roc_auc_score(truth[keep] == c, probabilities[keep, c]) for c in (0, 1, 3)])
    assert auc(truth[keep], probabilities[keep]) == pytest.approx(wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about the absent class
        wanted = sklearn_metrics.balanced_accuracy_score(truth[keep], probabilities[keep].argmax(1))
    assert balanced_accuracy(truth[keep], probabilities[keep].argmax(1)) == pytest.approx(wanted)


def test_what_is_undefined_is_none():
    assert auc([1, 1], [[0.5, 0.5], [0.2, 0.8]]) is None
    assert auc([0, 1], [[np.nan, 0.5], [0.2, 0.8]]) is None
    assert accuracy([], []) is None
    assert balanced_accuracy([], []) is None
