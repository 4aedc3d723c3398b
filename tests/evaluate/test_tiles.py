"""Evaluators of labelled tiles, against scikit-learn and plain formulas."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, average_precision_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dino.config.schema import LinearConfig
from dino.errors import DataError
from dino.evaluate import logistic, tiles
from dino.evaluate.logistic import BlockedLogisticRegression
from dino.evaluate.statistics import Scored
from dino.evaluate.task import Task, grouped_folds, read_folds, single_fold, write_folds

STRENGTHS = LinearConfig().strengths


def values_of(scored: Scored) -> dict[str, float]:
    """Statistics of the data."""
    weights = np.ones((1, len(scored.rows)))
    return {name: float(statistic(weights)[0]) for name, statistic in scored.statistics.items()}


@pytest.fixture
def features() -> np.ndarray:
    """120 features of three overlapping classes."""
    generator = np.random.default_rng(0)
    means = 1.5 * generator.standard_normal((3, 8))
    return (means[np.arange(120) % 3] + 1.5 * generator.standard_normal((120, 8))).astype(np.float32)


@pytest.fixture
def task() -> Task:
    """80 training and 40 test rows, four rows per patient."""
    rows = np.arange(120)
    groups = [f"patient {row // 4}" for row in rows]
    return Task(rows % 3, ["a", "b", "c"], groups, [single_fold(rows[:80], rows[80:])])


def test_a_linear_probe_is_that_of_scikit_learn(features: np.ndarray, task: Task) -> None:
    probe = tiles.linear(features, task, [0.1])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(features[:80], task.truth[:80])
    assert values_of(probe)["accuracy"] == pytest.approx(model.score(features[80:], task.truth[80:]))
    found = tiles.fit_linear(features, task.truth, np.arange(80), 0.1, 3)(np.arange(80, 120))
    assert found == pytest.approx(model.predict_proba(features[80:]), abs=1e-3)


def test_the_strength_is_chosen_on_training_rows_alone(features: np.ndarray, task: Task) -> None:
    """Other labels of the test rows change the score, not the strength; validation rows are used if there are any."""
    chosen = tiles.linear(features, task, STRENGTHS).details["strengths"]
    shuffled = task.truth.copy()
    shuffled[80:] = shuffled[80:][::-1]
    other = Task(shuffled, task.classes, task.groups, task.folds)
    assert tiles.linear(features, other, STRENGTHS).details["strengths"] == chosen
    validated = Task(task.truth, task.classes, task.groups, [single_fold(range(60), range(80, 120), range(60, 80))])
    scores = [
        tiles.fit_linear(features, task.truth, np.arange(60), strength, 3)(np.arange(60, 80)).argmax(1)
        for strength in STRENGTHS
    ]
    accuracies = [
        np.mean([(found == task.truth[60:80])[task.truth[60:80] == label].mean() for label in range(3)])
        for found in scores
    ]
    assert tiles.linear(features, validated, STRENGTHS).details["strengths"] == [STRENGTHS[int(np.argmax(accuracies))]]


def test_a_strength_that_cannot_be_chosen_is_1(features: np.ndarray) -> None:
    truth = np.arange(120) % 3
    groups = [f"patient {label}" for label in truth]
    task = Task(truth, ["a", "b", "c"], groups, [single_fold(range(80), range(80, 120))])
    assert tiles.linear(features, task, STRENGTHS).details["strengths"] == [1.0]


def test_float16_features_give_the_scores_of_the_same_values_in_float32(features: np.ndarray, task: Task) -> None:
    half = features.astype(np.float16)
    assert values_of(tiles.linear(half, task, STRENGTHS)) == values_of(
        tiles.linear(half.astype(np.float32), task, STRENGTHS)
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_linear_probe_that_reads_blocks_is_that_of_scikit_learn(
    features: np.ndarray, classes: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with features far from zero and of different scales, and a class that is not in the training rows."""
    shifted = ((features + 20) * 10.0 ** np.arange(-4, 4)).astype(dtype)
    truth = np.arange(120) % classes
    rows, test = np.arange(0, 80), np.arange(80, 120)
    scaler = StandardScaler().fit(shifted[rows].astype(np.float64))
    model = LogisticRegression(C=0.3, tol=1e-8, max_iter=10_000)
    expected = model.fit(scaler.transform(shifted[rows].astype(np.float64)), truth[rows]).predict_proba(
        scaler.transform(shifted[test].astype(np.float64))
    )
    monkeypatch.setattr(tiles, "IN_MEMORY", 0)
    monkeypatch.setattr(tiles, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(logistic, "ROWS_AT_ONCE", 7)
    found = tiles.fit_linear(shifted, truth, rows, 0.3, classes + 1)(test)
    assert found[:, :classes] == pytest.approx(expected, abs=1e-3) and not found[:, classes].any()


def test_the_strength_of_blocks_is_that_of_scikit_learn(
    features: np.ndarray, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiles.linear(features, task, STRENGTHS)
    monkeypatch.setattr(tiles, "IN_MEMORY", 0)
    found = tiles.linear(features, task, STRENGTHS)
    assert found.details == expected.details and values_of(found) == pytest.approx(values_of(expected), abs=1e-3)


def test_the_loss_of_blocks_and_its_gradient_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    inputs, truth, weights = generator.normal(size=(50, 4)), generator.integers(0, 3, 50), generator.normal(size=(3, 5))
    mean, scale = generator.normal(size=4), 1 + generator.random(4)

    def loss(parameters: np.ndarray) -> float:
        both = parameters.reshape(3, 5)
        logits = (inputs - mean) / scale @ both[:, :4].T + both[:, 4]
        entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(50), truth]
        return entropy.mean() + (both[:, :4] ** 2).sum() / (2 * 0.7 * 50)

    steps = 1e-6 * np.eye(15)
    slopes = [(loss(weights.ravel() + step) - loss(weights.ravel() - step)) / 2e-6 for step in steps]
    monkeypatch.setattr(logistic, "ROWS_AT_ONCE", 16)
    model = BlockedLogisticRegression(torch.from_numpy(inputs), mean, scale, 10)
    value, gradient = model._loss(weights.ravel(), torch.from_numpy(truth), 0.7)
    assert value == pytest.approx(loss(weights.ravel()), abs=1e-6)
    assert gradient == pytest.approx(np.array(slopes), abs=1e-6)


LARGE = """
import resource, sys
import numpy as np
from dino.evaluate import knn, tiles
from dino.evaluate.task import Task, single_fold
knn.ROWS_AT_ONCE, knn.SIMILARITIES_AT_ONCE, tiles.IN_MEMORY, tiles.ITERATIONS = 4096, 1 << 20, 1 << 20, 3
generator = np.random.default_rng(0)
features = np.concatenate([generator.standard_normal((4096, 512), np.float32).astype(np.float16) for _ in range(64)])
task = Task(np.arange(len(features)) % 3, "abc", [str(i) for i in range(len(features))],
            [single_fold(np.arange(len(features) - 256), np.arange(len(features) - 256, len(features)))])
small = Task(task.truth, task.classes, task.groups, [single_fold(np.arange(9000), np.arange(9000, 9100))])
def run(task):
    tiles.knn(features, task, [20], 0.07)
    tiles.linear(features, task, [1.0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # MB
first = run(small)
print(run(task) - first)
"""


@pytest.mark.slow
def test_many_tiles_are_judged_without_copies_of_their_features() -> None:
    """268 MB in fp16; one copy in float32 would be 537 MB."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", LARGE], check=True, capture_output=True, text=True, env=env)
    assert float(found.stdout) < 150


def test_knn_is_that_of_scikit_learn(features: np.ndarray, task: Task) -> None:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances**2 / 2) / 0.07)  # of the cosine similarity

    model = KNeighborsClassifier(7, weights=weights).fit(unit[:80], task.truth[:80])
    found = values_of(tiles.knn(features, task, [7], 0.07))
    assert found["knn_7_accuracy"] == pytest.approx(model.score(unit[80:], task.truth[80:]))


def test_few_shots_are_nearest_class_means(features: np.ndarray, task: Task) -> None:
    """Against a plain loop over the same examples, in float64."""
    from dino import randomness

    found = tiles.fewshot(features, task, [2, 5], draws=3)
    assert found.primary == "fewshot_5_balanced_accuracy"
    recalls = np.zeros((3, 3))
    for draw in range(3):
        generator = randomness.generator(0, draw, "few-shot/0/5")
        drawn = [generator.choice(np.arange(80)[task.truth[:80] == label], 5, False) for label in range(3)]
        centre = features[np.concatenate(drawn)].astype(float).mean(0)

        def scaled(rows: np.ndarray, centre: np.ndarray = centre) -> np.ndarray:
            moved = features[rows].astype(float) - centre
            return moved / np.linalg.norm(moved, axis=1, keepdims=True)

        means = np.stack([scaled(rows).mean(0) for rows in drawn])
        distances = ((scaled(np.arange(80, 120))[:, None] - means) ** 2).sum(2)
        right = distances.argmin(1) == task.truth[80:]
        recalls[draw] = [right[task.truth[80:] == label].mean() for label in range(3)]
    assert values_of(found)["fewshot_5_balanced_accuracy"] == pytest.approx(recalls.mean())


def test_shots_that_a_class_cannot_give_are_left_out(features: np.ndarray, task: Task) -> None:
    assert list(tiles.fewshot(features, task, [1, 500], 2).statistics) == ["fewshot_1_balanced_accuracy"]
    with pytest.raises(DataError, match="expected at least 500 training rows of every class, found 26"):
        tiles.fewshot(features, task, [500], 2)


def test_retrieval_leaves_out_the_own_patient(features: np.ndarray, task: Task) -> None:
    """Average precision against scikit-learn, query by query."""
    everything = Task(task.truth, task.classes, task.groups, grouped_folds(*labels_and_groups(task), 3, 0))
    found = tiles.retrieval(features, everything, [1, 5])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    precisions, hits = [], []
    for row in found.rows:
        others = np.array([i for i in range(120) if task.groups[i] != task.groups[row]])
        similarity = unit[others] @ unit[row]
        relevant = task.truth[others] == task.truth[row]
        precisions.append(average_precision_score(relevant, similarity))
        hits.append(relevant[np.argsort(-similarity, kind="stable")[:5]])
    scores = values_of(found)
    assert scores["map"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert scores["precision_5"] == pytest.approx(np.mean(hits))
    assert scores["top_5"] == pytest.approx(np.mean([one.any() for one in hits]))


def labels_and_groups(task: Task) -> tuple[list[str], list[str]]:
    return [task.classes[label] for label in task.truth], list(task.groups)


@pytest.mark.parametrize(
    ("statistic", "library"),
    [(tiles.adjusted_rand, adjusted_rand_score), (tiles.mutual_information, normalized_mutual_info_score)],
)
def test_agreement_of_partitions_is_that_of_scikit_learn(statistic: Callable, library: Callable) -> None:
    generator = np.random.default_rng(1)
    truth = generator.integers(0, 4, 90)
    assigned = np.where(generator.random(90) < 0.6, truth, generator.integers(0, 4, 90))
    assert statistic(truth, assigned)(np.ones((1, 90)))[0] == pytest.approx(library(truth, assigned))


def test_clusters_of_separate_classes_are_the_classes() -> None:
    features = np.repeat(np.eye(3, 6, dtype=np.float32), 20, 0)
    features += 0.01 * np.random.default_rng(0).standard_normal(features.shape).astype(np.float32)
    rows = np.arange(60)
    task = Task(rows // 20, ["a", "b", "c"], [str(row) for row in rows], [single_fold([], rows)])
    assert values_of(tiles.cluster(features, task)) == pytest.approx({"ari": 1.0, "nmi": 1.0})


def test_chance_is_what_features_without_information_score(task: Task) -> None:
    noise = np.random.default_rng(0).standard_normal((120, 8)).astype(np.float32)
    names = ["balanced_accuracy", "accuracy", "auc", "map", "precision_5", "ari", "unknown"]
    found = tiles.chance(task, names)
    assert "unknown" not in found
    measured = {**values_of(tiles.retrieval(noise, task, [5])), **values_of(tiles.cluster(noise, task))}
    for name in ("map", "precision_5", "ari"):
        assert measured[name] == pytest.approx(found[name], abs=0.08)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 14)), min_size=30, max_size=80), st.integers(2, 4))
def test_no_patient_is_on_both_sides_of_a_fold(rows: list[tuple[int, int]], folds: int) -> None:
    labels, groups = [str(label) for label, _ in rows], [str(group) for _, group in rows]
    try:
        found = grouped_folds(labels, groups, folds, 0)
    except DataError:
        return
    for fold in found:
        assert not {groups[i] for i in fold.train} & {groups[i] for i in fold.test}
    assert sorted(np.concatenate([fold.test for fold in found])) == list(range(len(rows)))


def test_folds_are_read_as_they_were_written(task: Task, tmp_path) -> None:
    labels, groups = labels_and_groups(task)
    names = [f"=image {i}.png" for i in range(120)]
    folds = grouped_folds(labels, groups, 3, 5)
    write_folds(tmp_path / "folds.csv", names, folds)
    for before, after in zip(folds, read_folds(tmp_path / "folds.csv", names), strict=True):
        assert np.array_equal(before.test, after.test) and np.array_equal(before.train, after.train)
    with pytest.raises(DataError, match="a fold, of at least two, for each of the 1 rows"):
        read_folds(tmp_path / "folds.csv", names[:1])
