import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from dino.config.evaluators import RobustnessConfig
from dino.errors import ConfigError, DataError
from dino.evaluate.confounders import check_neighbours, design
from dino.evaluate.results import Entry, collect
from dino.evaluate.robustness import (
    chance,
    lower_mean,
    median,
    nearest,
    neighbour_measures,
    probe_folds,
    robustness,
    unit_rows,
)

K = [5, 11]
MEASURES = ("ri", "mari", "croma", "croma_tail")


def synthetic(biology, centre, rows=240, patients=24, values=2, classes=2, seed=0):
    """Features whose label and centre are ``biology`` and ``centre`` standard deviations apart, and their design."""
    random = np.random.default_rng(seed)
    patient = np.arange(rows) % patients
    place, label = patient % values, random.integers(0, classes, rows)
    features = random.normal(size=(rows, 16))
    features[:, :classes] += biology * np.eye(classes)[label]
    features[:, classes : classes + values] += centre * np.eye(values)[place]
    found = design("centre", [f"k{i}" for i in label], [f"c{i}" for i in place], [f"p{i}" for i in patient])
    return features, found


def scored_rows(features, found, folds=3, **changes):
    settings = RobustnessConfig(**{"k": K, "apd": 0, "strengths": [0.01], **changes})
    return robustness(features, found, np.arange(240), probe_folds(found, folds, 0), settings)


def values_of(statistics, weights=None):
    rows = 240 if weights is None else len(weights)
    weights = np.ones(rows) if weights is None else weights
    return {name: float(statistic(weights[None])[0]) for name, statistic in statistics.items()}


def published(features, found, k, m, tau=None, rows=None):
    """RI, MaRI, CRoMa and its tail as the papers define them, in loops over rows and neighbours, in float64."""
    unit = [x / np.sqrt((x**2).sum()) for x in np.asarray(features, np.float64)]
    so = os = weighted_so = weighted_os = 0.0
    margins, typed = [], []
    for i in range(len(unit)) if rows is None else rows:
        others = [j for j in range(len(unit)) if found.groups[j] != found.groups[i]]
        distance = {j: 1 - float(unit[i] @ unit[j]) for j in others}
        others.sort(key=distance.__getitem__)
        biology = [
            j for j in others if found.labels[j] == found.labels[i] and found.confounders[j] != found.confounders[i]
        ]
        shortcut = [
            j for j in others if found.labels[j] != found.labels[i] and found.confounders[j] == found.confounders[i]
        ]
        near = set(others[:k])
        for kind in (biology, shortcut):
            typed += [distance[j] for j in kind if j in near]
        so, os = so + len(near & set(biology)), os + len(near & set(shortcut))
        if tau is not None:
            weighted_so += sum(np.exp(-distance[j] / tau) for j in biology if j in near)
            weighted_os += sum(np.exp(-distance[j] / tau) for j in shortcut if j in near)
        d_so, d_os = (np.mean([distance[j] for j in kind[:m]]) for kind in (biology, shortcut))
        margins.append((d_os - d_so) / (d_os + d_so))
    if tau is None:
        return published(features, found, k, m, float(np.median(typed)), rows)
    tail = [value for value in margins if value <= np.percentile(margins, 10)]
    return {
        "ri": so / (so + os),
        "mari": weighted_so / (weighted_so + weighted_os),
        "croma": float(np.median(margins)),
        "croma_tail": float(np.mean(tail)),
    }


@pytest.mark.parametrize(("biology", "centre"), [(3, 3), (1, 2), (0, 0)])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_measures_are_those_of_the_papers(biology, centre, classes):
    features, found = synthetic(biology, centre, classes=classes)
    statistics, details = neighbour_measures(features.astype(np.float32), found, K, 3)
    expected = published(features.astype(np.float32), found, details["k"], 3)
    assert values_of(statistics) == pytest.approx(expected, abs=1e-9)


def test_the_measures_are_those_of_croma():
    """Ours are functions of the rows' weights; their values on the data are the package's, at the k that it chooses."""
    import pandas as pd
    from croma import RI, CRoMa, MaRI

    features, found = synthetic(1, 1)
    names = [str(i) for i in range(len(features))]
    manifest = pd.DataFrame({
        "sample_id": names, "image_path": names, "label": found.labels, "group_id": found.groups,
        "centre": found.confounders,
    })  # fmt: skip
    statistics, details = neighbour_measures(features, found, K, 5)
    ri, mari = (kind.compute(features, manifest, confounder_column="centre", k_candidates=K) for kind in (RI, MaRI))
    margin = CRoMa.compute(features, manifest, confounder_column="centre")
    expected = (ri.value, mari.value, margin.value, margin.ltm_alpha)
    assert values_of(statistics) == pytest.approx(dict(zip(MEASURES, expected, strict=True)), abs=1e-9)
    assert (details["k"], details["tau"], details["support"]) == (ri.k, pytest.approx(mari.tau), ri.support)


def test_biology_gives_1_and_the_centre_0_and_noise_what_chance_gives():
    found = {name: neighbour_measures(*synthetic(*of), K, 5)[0] for name, of in
             {"biology": (9, 0), "centre": (0, 9), "noise": (0, 0)}.items()}  # fmt: skip
    values = {name: values_of(statistics) for name, statistics in found.items()}
    by_chance = values_of(chance(synthetic(0, 0)[1], np.arange(240), MEASURES).statistics)
    assert values["biology"]["ri"] > 0.99 and values["biology"]["mari"] > 0.99 and values["biology"]["croma"] > 0.4
    assert values["centre"]["ri"] < 0.01 and values["centre"]["mari"] < 0.01 and values["centre"]["croma"] < -0.4
    assert values["noise"]["ri"] == pytest.approx(by_chance["ri"], abs=0.05)
    assert values["noise"]["croma"] == pytest.approx(by_chance["croma"], abs=0.02)


def test_chance_is_the_expectation_of_random_neighbours():
    _, found = synthetic(0, 0, rows=120, patients=10, classes=3)
    counts = np.zeros(4)
    for i in range(120):
        others = np.flatnonzero(found.groups != found.groups[i])
        kinds = [
            2 * int(found.labels[i] != found.labels[j]) + int(found.confounders[i] != found.confounders[j])
            for j in others
        ]
        assert list(np.bincount(kinds, minlength=4)) == list(found.candidates()[i])
        counts += np.bincount(kinds, minlength=4) / len(others)
    scored = chance(found, np.arange(120), MEASURES)
    assert float(scored.statistics["ri"](np.ones((1, 120)))[0]) == pytest.approx(counts[1] / (counts[1] + counts[2]))
    assert list(scored.details["neighbours"].values()) == pytest.approx(counts / 120)


def test_a_bootstrap_sample_counts_each_row_as_often_as_it_was_drawn():
    features, found = synthetic(1, 1, rows=120)
    statistics, details = neighbour_measures(features, found, K, 5)
    weights = np.random.default_rng(0).integers(0, 4, 120).astype(float)
    drawn = np.repeat(np.arange(120), weights.astype(int))
    expected = published(features, found, details["k"], 5, details["tau"], drawn)
    assert values_of(statistics, weights) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_medians_and_tails_are_those_of_repeated_values(seed):
    random = np.random.default_rng(seed)
    values: NDArray[np.float64] = random.normal(size=40).round(1)  # with ties
    weights = random.integers(0, 3, (6, 40)).astype(float)
    for row, middle, tail in zip(weights, median(values)(weights), lower_mean(values, 0.1)(weights), strict=True):
        repeated = np.repeat(values, row.astype(int))
        assert middle == pytest.approx(np.median(repeated))
        assert tail == pytest.approx(repeated[repeated <= np.percentile(repeated, 10) + 1e-12].mean())


def test_rows_of_one_patient_are_not_neighbours():
    features, found = synthetic(0, 0, rows=60, patients=6)
    features += 5 * np.eye(16)[found.groups]  # every patient is a cluster
    kinds, distances = nearest(unit_rows(features, 60), found, 20)
    assert kinds.shape == (60, 20)
    near_patients = 1 - unit_rows(features, 60) @ unit_rows(features, 60).T
    near_patients[found.groups[:, None] == found.groups] = np.inf
    assert np.allclose(np.sort(distances, 1), np.sort(near_patients, 1)[:, :20])


def test_equal_features_have_no_margin_and_say_so():
    _, found = synthetic(0, 0)
    statistics, details = neighbour_measures(np.ones((240, 4)), found, K, 5)
    values = values_of(statistics)
    assert np.isnan(values["croma"]) and np.isnan(values["croma_tail"])
    assert "zero margin denominator" in details["croma_undefined"]


ROWS = ["a", "b", "a", "b"], ["A", "A", "B", "B"], ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("labels", "centres", "message"),
    [
        ("abab", "AAAA", r"at least two values of scanner.*only 'A'.*or compare another column"),
        ("abaa", "AABB", r"only class 'a' from scanner 'B'.*remove its rows, or add other classes"),
        ("ababac", "AABBBB", r"class 'c' only from scanner 'B'.*remove them, or add rows of another scanner"),
    ],
)
def test_a_design_without_contrast_is_an_error(labels, centres, message):
    with pytest.raises(DataError, match=message) as caught:
        design("scanner", list(labels), list(centres), [str(i) for i in range(len(labels))])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("k", "m", "error", "message"),
    [
        ([], 5, ConfigError, "at least one k"),
        ([5, 0], 5, ConfigError, r"each 1 or more, and m of 1 or more, found k=\[5, 0\]"),
        ([5], 0, ConfigError, "m=0"),
        ([5, 231], 5, DataError, r"k=231 rows of other patients for every row, found 230: give smaller k"),
        (
            [5],
            60,
            DataError,
            r"m=60 rows of other patients of .* found \d+ for class 'k\d' and centre 'c\d': give a sm",
        ),
    ],
)
def test_too_few_neighbours_are_an_error(k, m, error, message):
    _, found = synthetic(0, 0)
    with pytest.raises(error, match=message) as caught:
        check_neighbours(found, k, m)
    assert "\n" not in str(caught.value)
    check_neighbours(found, K, 5)


@pytest.mark.parametrize(("biology", "centre", "label_probe", "centre_probe"), [(9, 0, 1, 0.5), (0, 9, 0.5, 1)])
def test_probes_find_what_the_features_contain(biology, centre, label_probe, centre_probe):
    features, found = synthetic(biology, centre)
    scored = scored_rows(features, found)
    values = values_of(scored.statistics)
    assert list(values) == [*MEASURES, "label_probe", "centre_probe"]
    assert values["label_probe"] == pytest.approx(label_probe, abs=0.1)
    assert values["centre_probe"] == pytest.approx(centre_probe, abs=0.1)


def test_a_probe_is_that_of_scikit_learn_on_the_same_folds():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.preprocessing import StandardScaler

    features, found = synthetic(1, 1)
    folds = probe_folds(found, 4, seed=0)
    predicted = np.zeros(240, int)
    for fold in folds:
        assert not set(found.groups[fold.train]) & set(found.groups[fold.test])
        scaler = StandardScaler().fit(features[fold.train])
        model = LogisticRegression(C=0.1, tol=1e-6, max_iter=1000)
        model.fit(scaler.transform(features[fold.train]), found.confounders[fold.train])
        predicted[fold.test] = model.predict(scaler.transform(features[fold.test]))
    scored = scored_rows(features, found, folds=4, strengths=[0.1])
    expected = balanced_accuracy_score(found.confounders, predicted)
    assert values_of(scored.statistics)["centre_probe"] == pytest.approx(expected, abs=0.005)
    twice = np.where(np.arange(240) < 120, 2.0, 0.0)
    drawn = np.repeat(np.arange(120), 2)
    expected = balanced_accuracy_score(found.confounders[drawn], predicted[drawn])
    assert values_of(scored.statistics, twice)["centre_probe"] == pytest.approx(expected, abs=0.01)


def test_intervals_are_over_patients_and_the_performance_drop_has_none():
    features, found = synthetic(2, 1)
    models = [scored_rows(x, found, apd=2) for x in (features, synthetic(0, 2)[0])]
    entries = [Entry(f"m{i}", "model", scored) for i, scored in enumerate(models)]
    result = collect("robustness", "labels.csv", entries, list(found.groups), 200, 0, {})
    assert result.primary == "ri" and result.about["resampled"] == 24
    first, second = result.rows
    for name in (*MEASURES, "label_probe", "centre_probe"):
        estimate, difference = first.estimates[name], second.differences[name]
        assert estimate.low is not None and estimate.high is not None and estimate.value is not None
        assert estimate.low <= estimate.value <= estimate.high and estimate.low < estimate.high
        assert difference.low is not None
    assert first.estimates["apd"].value is not None and first.estimates["apd"].low is None
    assert second.differences["ri"].high is not None and second.differences["ri"].high < 0
    assert len(first.details["apd_accuracies"]) == 5


def test_the_folds_are_fewer_where_patients_are_few():
    _, found = synthetic(0, 0, rows=60, patients=6)
    assert len(probe_folds(found, 5, 0)) == 3
    single = design("centre", list("abababab"), list("AAAABBBB"), list("ppqqrrrr"))
    with pytest.raises(DataError, match=r"two patients of every centre, found one of 'B'.*remove its rows"):
        probe_folds(single, 5, 0)


def test_features_that_are_not_finite_are_an_error():
    features, found = synthetic(0, 0)
    features[[3, 7], 2] = np.nan
    with pytest.raises(DataError, match=r"NaN or infinity in 2 of 240 rows"):
        neighbour_measures(features, found, K, 5)
    with pytest.raises(DataError, match=r"features \(240, D\), found \(239, 16\)"):
        neighbour_measures(features[1:], found, K, 5)


def test_without_croma_the_extra_is_named():
    program = (
        "import sys; sys.modules['croma'] = None\n"
        "from dino.evaluate.confounders import import_croma\n"
        "from dino.errors import ConfigError\n"
        "try:\n    import_croma()\nexcept ConfigError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'histodino[evaluate]'" in result.stdout
