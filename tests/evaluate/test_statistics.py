"""Statistics of weighted rows, and their bootstrap over patients."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dino.evaluate import statistics
from dino.evaluate.metrics import accuracy, auc, balanced_accuracy


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Truth and probabilities of 60 rows of three classes, with ties."""
    generator = np.random.default_rng(0)
    probabilities = np.round(generator.dirichlet(np.ones(3), 60), 1)
    return generator.integers(0, 3, 60), probabilities


def test_statistics_of_the_data_are_the_metrics(rows: tuple[np.ndarray, np.ndarray]) -> None:
    truth, probabilities = rows
    predicted, ones = probabilities.argmax(1), np.ones((1, 60))
    assert statistics.accuracy(truth, predicted)(ones)[0] == pytest.approx(accuracy(truth, predicted))
    assert statistics.balanced_accuracy(truth, predicted)(ones)[0] == pytest.approx(balanced_accuracy(truth, predicted))
    assert statistics.auc(truth, probabilities)(ones)[0] == pytest.approx(auc(truth, probabilities))
    two = probabilities[:, :2], truth.clip(max=1)
    assert statistics.auc(two[1], two[0])(ones)[0] == pytest.approx(auc(two[1], two[0]))


def test_weights_count_rows_as_often_as_they_were_drawn(rows: tuple[np.ndarray, np.ndarray]) -> None:
    """Against scikit-learn, on the rows repeated."""
    truth, probabilities = rows
    predicted = probabilities.argmax(1)
    weights = np.random.default_rng(1).integers(0, 4, (5, 60))
    for found_balanced, found_auc, times in zip(
        statistics.balanced_accuracy(truth, predicted)(weights.astype(float)),
        statistics.auc(truth == 2, np.stack([-probabilities[:, 2], probabilities[:, 2]], 1))(weights.astype(float)),
        weights,
        strict=True,
    ):
        repeated = np.repeat(np.arange(60), times)
        assert found_balanced == pytest.approx(balanced_accuracy_score(truth[repeated], predicted[repeated]))
        assert found_auc == pytest.approx(roc_auc_score(truth[repeated] == 2, probabilities[repeated, 2]))


def test_a_sample_without_a_class_leaves_it_out() -> None:
    truth, predicted = np.array([0, 0, 1]), np.array([0, 1, 1])
    weights = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert statistics.balanced_accuracy(truth, predicted)(weights) == pytest.approx([0.5, np.nan], nan_ok=True)
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9]])
    assert np.isnan(statistics.auc(truth, scores)(weights)).all()


def test_samples_hold_whole_groups_and_are_the_same_for_all_models() -> None:
    groups = ["a", "a", "b", "c", "c", "c"]
    weights = np.concatenate(list(statistics.resamples(groups, 50, seed=3)))
    assert weights.shape == (50, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    again = np.concatenate(list(statistics.resamples(groups, 50, seed=3)))
    assert np.array_equal(weights, again)
    assert list(statistics.resamples(["a", "a"], 50, seed=3)) == []


def test_samples_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [str(i) for i in range(7)]
    whole = np.concatenate(list(statistics.resamples(groups, 20, seed=0)))
    monkeypatch.setattr(statistics, "WEIGHTS_AT_ONCE", 21)
    assert np.array_equal(np.concatenate(list(statistics.resamples(groups, 20, seed=0))), whole)


def test_differences_of_two_models_are_paired() -> None:
    """A model that is right on one more row of each patient is better in every sample."""
    groups = [str(i // 4) for i in range(40)]
    truth = np.zeros(40, int)
    worse, better = np.arange(40) % 2, (np.arange(40) % 4 == 3).astype(int)
    samples = [
        statistics.bootstrap({"accuracy": statistics.accuracy(truth, one)}, groups)["accuracy"]
        for one in (worse, better)
    ]
    assert (samples[1].values - samples[0].values == pytest.approx(0.25)) or (
        samples[1].values > samples[0].values
    ).all()


@pytest.mark.slow
def test_intervals_contain_the_true_value_at_the_nominal_rate() -> None:
    """Patients differ in how hard they are, so that intervals over rows would be far too narrow."""
    from dino.evaluate.results import estimate

    generator, hits, narrow_hits, trials = np.random.default_rng(0), 0, 0, 400
    for trial in range(trials):
        share = generator.beta(4, 2, 60)  # of correct rows of each of 60 patients: 2/3 in the mean
        correct = (generator.random((60, 20)) < share[:, None]).ravel()
        patients = np.repeat(np.arange(60), 20)
        for name, groups in (("patients", patients), ("rows", np.arange(1200))):
            found = statistics.bootstrap({"accuracy": statistics.mean(correct)}, groups.tolist(), 400, trial)[
                "accuracy"
            ]
            interval = estimate(found.value, found.values)
            assert interval.low is not None and interval.high is not None
            inside = interval.low <= 2 / 3 <= interval.high
            hits, narrow_hits = hits + (inside and name == "patients"), narrow_hits + (inside and name == "rows")
    low, high = stats.binom.interval(0.998, trials, 0.94)  # percentile intervals of 60 patients are slightly narrow
    assert low <= hits <= high
    assert narrow_hits < 0.75 * trials
