"""Tables of slides and patients, outcomes, and the folds of slide models."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score

from dino.errors import ConfigError, DataError
from dino.evaluate.outcomes import Classes, Numbers, Survival
from dino.evaluate.pooling import LinearModel, NoFeatures, cross_validate, inner_folds
from dino.evaluate.slides import check_folds, read_cases, read_slides_of_patients, split
from dino.evaluate.task import grouped_folds, single_fold

ONE = np.ones((1, 60))


@pytest.fixture
def table(tmp_path):
    """Writes a table and returns its path."""

    def write(text):
        path = tmp_path / "labels.csv"
        path.write_text(text)
        return path

    return write


def test_a_table_of_slides(table):
    found = read_cases(table("slide_id,label,patient_id,age\na,1.0,p,3\nb,0,p,\nc,1,,7\n"))
    assert (found.task, found.unit, found.groups) == ("classification", "slide", ["p", "p", "slide c"])
    assert found.outcome().strata() == ["1", "0", "1"]
    assert [case.slides for case in found.cases] == [("a",), ("b",), ("c",)]


def test_the_slides_of_a_patient_are_one_case(table):
    path = table("slide_id;patient_id;time;event\na;p;3;1\nb;p;3;1\nc;q;4.5;false\n")
    assert read_cases(path).unit == "slide"
    found = read_cases(path, unit="patient")
    assert [(case.name, case.slides) for case in found.cases] == [("p", ("a", "b")), ("q", ("c",))]
    outcome = found.outcome()
    assert (
        isinstance(outcome, Survival)
        and outcome.times.tolist() == [3, 4.5]
        and outcome.events.tolist() == [True, False]
    )


def test_a_table_of_patients_gets_their_slides_from_another(table, tmp_path):
    found = read_cases(table("patient_id,label\np,x\nq,y\n"))
    slides = tmp_path / "slides.csv"
    slides.write_text("sample_id,patient_id,image_path\na,p,1\nb,q,2\nc,p,3\nd,,4\n")
    found = found.with_slides(read_slides_of_patients(slides))
    assert [case.slides for case in found.cases] == [("a", "c"), ("b",)]


TWO = "slide_id,label\na,x\nb,y\n"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("slide,label\na,x\n", {}, "missing slide_id; found slide, label; did you mean 'slide'?"),
        ("slide_id,Label\na,x\n", {}, "missing label; found slide_id, Label; did you mean 'Label'?"),
        ("slide_id,time,events\na,3,1\n", {}, "missing event; found slide_id, time, events; did you mean 'events'?"),
        ("slide_id,label\na,x\nb,x\n", {}, "expected a second class among the labels, found only 'x'"),
        ("slide_id,label\na,x\nb,\n", {}, "expected a label in every row, found 1 blank ones (line 3)"),
        ("slide_id,label\na,x\n,y\n", {}, "expected a slide_id in every row"),
        ("slide_id,label\na,3\nb,inf\n", {"task": "regression"}, "expected a number as label in every row"),
        ("slide_id,label\na,3\nb,3\n", {"task": "regression"}, "expected a second value among the labels"),
        ("slide_id,time,event\na,3,0\nb,4,0\n", {}, "found 2 censored cases"),
        ("slide_id,time,event\na,-3,0\nb,4,1\n", {}, "expected a time of 0 or more in every row"),
        ("slide_id,time,event\na,3,dead\nb,4,1\n", {}, "expected 0 or 1 as event in every row"),
        (TWO + "a,y\n", {}, "expected every slide once, found 'a' again on line 4"),
        (
            "slide_id,patient_id,label\na,p,x\nb,p,y\n",
            {"unit": "patient"},
            "expected equal labels in all rows of a patient",
        ),
        (
            "slide_id,patient_id,label,partition\na,p,x,train\nb,p,y,test\n",
            {},
            "expected every patient in one partition",
        ),
        ("slide_id,label,partition\na,x,train\nb,y,later\n", {}, "expected train, val or test as partition"),
    ],
)
def test_bad_tables_are_refused_in_one_line(table, text, arguments, message):
    with pytest.raises(DataError) as error:
        read_cases(table(text), **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [{"task": "regresion"}, {"unit": "tile"}])
def test_unknown_tasks_and_units_are_refused(table, arguments):
    with pytest.raises(ConfigError, match="expected .*, found"):
        read_cases(table(TWO), **arguments)


def test_slides_without_features_are_counted_and_named(table):
    found = read_cases(table(TWO + "slide_3.svs,x\nd,y\n"))
    with pytest.raises(DataError) as error:
        found.with_features({"a", "b", "slide_3"}, "features", 1)
    assert "found none of 2 (slide_3.svs, d) (the nearest to 'slide_3.svs' is 'slide_3')" in str(error.value)
    assert "max_missing=2" in str(error.value)
    assert [case.name for case in found.with_features({"a", "b", "slide_3"}, "features", 2).cases] == ["a", "b"]


def test_partitions_are_used_as_they_are(table):
    found = read_cases(table("slide_id,label,partition\na,x,train\nb,y,reference\nc,x,test\nd,y,val\n"))
    (fold,) = split(found, found.outcome(), 5, 0)
    assert [rows.tolist() for rows in (fold.train, fold.test, fold.validation)] == [[0, 1], [2], [3]]
    (inner,) = inner_folds(fold, found.outcome(), found.groups, 3, 0)
    assert [rows.tolist() for rows in (inner.train, inner.test)] == [[0, 1], [3]]


@settings(max_examples=50, deadline=None)
@given(
    patients=st.lists(st.integers(0, 25), min_size=30, max_size=60),
    folds=st.integers(2, 5),
    seed=st.integers(0, 9),
    kind=st.sampled_from(["classes", "numbers", "survival"]),
)
def test_no_patient_is_on_two_sides_of_a_fold(patients, folds, seed, kind):
    numbers = np.random.default_rng(seed).normal(size=len(patients))
    outcome = {
        "classes": lambda: Classes([str(patient % 2) for patient in patients]),
        "numbers": lambda: Numbers(numbers),
        "survival": lambda: Survival(np.abs(numbers), numbers < 1),
    }[kind]()
    groups = [f"p{patient}" for patient in patients]
    by = outcome.strata_of(range(len(groups)), groups, folds)

    try:
        outer = grouped_folds(by, groups, folds, seed)
    except DataError:  # too few patients of a class
        return
    assert sorted(row for fold in outer for row in fold.test) == list(range(len(patients)))
    for fold in outer:
        inner = inner_folds(fold, outcome, groups, 3, seed)
        assert not {row for one in inner for row in (*one.train, *one.test)} & set(fold.test)
        for one in [fold, *inner]:
            assert not {groups[row] for row in one.train} & {groups[row] for row in one.test}


def test_too_few_patients_and_shared_patients_are_refused(table):
    found = read_cases(table("slide_id,label,patient_id\na,x,p\nb,y,p\nc,x,q\nd,y,q\n"))
    with pytest.raises(DataError, match="at least as many patients .* as folds, found 2 and 5 folds; set folds=N"):
        split(found, found.outcome(), 5, 0)
    with pytest.raises(DataError, match=r"expected folds that share no patient, found 1 .* of fold 1 \(q\)"):
        check_folds(found, found.outcome(), [single_fold([0, 1, 2], [3])])
    with pytest.raises(DataError, match="expected a second class among the training rows of every fold"):
        check_folds(read_cases(table(TWO)), Classes(["x", "y"]), [single_fold([0], [1])])


def test_too_few_events_for_the_folds_are_refused():
    outcome = Survival(np.arange(1.0, 21), np.arange(20) < 3)
    groups = [str(i) for i in range(20)]
    assert set(outcome.strata_of(range(20), groups, 5)) == {"event", "censored"}  # grouped_folds refuses these
    assert set(Survival(outcome.times, ~outcome.events).strata_of(range(20), groups, 5)) == {"all"}


PARTS = [np.arange(0, 25), np.arange(25, 60)]


def test_scores_of_classes_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 60)
    second = random.random(60).round(1)
    outcome = Classes([f"class {c}" for c in truth])
    statistics = outcome.statistics(np.stack([1 - second, second], 1), np.arange(60), PARTS)
    expected = np.mean([roc_auc_score(truth[part], second[part]) for part in PARTS])
    assert statistics["auc"](ONE)[0] == pytest.approx(expected)
    assert list(statistics) == ["auc", "balanced_accuracy", "accuracy"]


def test_scores_of_numbers_are_those_of_scikit_learn_and_scipy():
    random = np.random.default_rng(0)
    truth = random.normal(5, 2, 60)
    predicted = truth + random.normal(size=60)
    statistics = Numbers(truth).statistics(predicted[:, None], np.arange(60), PARTS)
    weights = random.integers(0, 3, (1, 60)).astype(float)
    for drawn in (ONE, weights):
        rows = np.repeat(np.arange(60), drawn[0].astype(int))
        correlations = [pearsonr(truth[rows][m], predicted[rows][m])[0] for m in (rows < 25, rows >= 25)]
        assert statistics["r2"](drawn)[0] == pytest.approx(r2_score(truth[rows], predicted[rows]))
        assert statistics["pearson"](drawn)[0] == pytest.approx(np.mean(correlations))
        assert statistics["mae"](drawn)[0] == pytest.approx(mean_absolute_error(truth[rows], predicted[rows]))


@pytest.mark.parametrize(
    ("outcome", "metric", "value"),
    [
        (Classes(["x", "y", "y"] * 20), "auc", 0.5),
        (Classes(["x", "y", "y"] * 20), "balanced_accuracy", 0.5),
        (Numbers(np.arange(60.0)), "pearson", np.nan),
        (Survival(np.arange(1.0, 61), np.arange(60) % 2 == 0), "c_index", 0.5),
    ],
)
def test_a_constant_is_at_chance(outcome, metric, value):
    folds = [single_fold(PARTS[1], PARTS[0]), single_fold(PARTS[0], PARTS[1])]
    statistics = cross_validate(outcome, folds, [[], []], NoFeatures(outcome)).statistics
    assert statistics[metric](ONE)[0] == pytest.approx(value, nan_ok=True)


def test_the_penalty_is_chosen_without_the_test_rows():
    """Labels of test rows change no prediction."""
    random = np.random.default_rng(0)
    labels = np.array(["x", "y"])[random.integers(0, 2, 60)]
    vectors = random.normal(size=(60, 200)) + (labels == "x")[:, None] * 0.2
    changed = labels.copy()
    changed[PARTS[0]] = "x"
    chosen, predicted = [], []
    for one in (labels, changed):
        outcome = Classes(one)
        fold = single_fold(PARTS[1], PARTS[0])
        inner = inner_folds(fold, outcome, [str(i) for i in range(60)], 3, 0)
        model = LinearModel(outcome, vectors)
        chosen.append(cross_validate(outcome, [fold], [inner], model).details["chosen"])
        predicted.append(model.predict(fold.train, fold.test, 3))
    assert chosen[0] == chosen[1] and np.array_equal(*predicted)
