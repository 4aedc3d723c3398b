import numpy as np
import pytest

from dino.evaluate.confounders import design
from dino.evaluate.performance_drop import SPLITS, balanced_rows, own_cells, performance_drop, schedule


def design_of(values, classes, rows=400, patients=40):
    patient = np.arange(rows) % patients
    label = np.arange(rows) // patients % classes
    return design(
        "centre", [f"k{i:02}" for i in label], [f"c{i:02}" for i in patient % values], [str(i) for i in patient]
    )


def features_of(found, biology, centre, seed=0):
    features = np.random.default_rng(seed).normal(size=(len(found.labels), 8))
    features[:, 0] += biology * (found.labels - found.labels.mean())
    features[:, 1] += centre * (found.confounders - found.confounders.mean())
    return features


@pytest.mark.parametrize(("values", "classes"), [(2, 2), (2, 5), (5, 2), (4, 4), (3, 2), (2, 3)])
def test_the_splits_go_from_balance_to_complete_association(values, classes):
    found = design_of(values, classes)
    own = own_cells(found)
    assert own.any(0).all() and own.any(1).all() and (own.sum(0) == 1).all() | (own.sum(1) == 1).all()
    plans = schedule(found, 12)
    tables = [np.array([take for *_, take in plan]).reshape(values, classes) for plan, _ in plans]
    assert len(plans) == SPLITS
    assert (tables[0] == 12).all()
    assert ((tables[-1] > 0) == own).all()
    for table in tables:
        assert np.abs(table.sum(0) - 12 * values).max() <= values  # up to rounding, as many rows of every class
        assert table.max() <= plans[0][1]
    assert all(plan[1] == max(table.max() for table in tables) for plan in plans)


def test_the_schedule_of_two_centres_and_classes_is_that_of_pathorob():
    from croma.downstream import pathorob_schedule

    plans = pathorob_schedule("camelyon", rows_per_slide=1)
    ours = [np.array([take for *_, take in plan]) for plan, _ in schedule(design_of(2, 2), 28)]
    theirs = [np.array([take for *_, take in plan]) for plan, _ in plans]
    # Theirs has 8 splits, and the other diagonal: from 7 rows everywhere to 14 and 0.
    assert list(theirs[0]) == [7, 7, 7, 7] and list(ours[0]) == [28] * 4
    assert list(theirs[-1]) == [0, 14, 14, 0] and list(ours[-1]) == [56, 0, 0, 56]


@pytest.mark.parametrize(("values", "classes"), [(2, 2), (2, 5), (5, 2)])
def test_the_balanced_split_leaves_enough_for_the_last_one(values, classes):
    found = design_of(values, classes)
    available = [40] * (values * classes)
    rows = balanced_rows(available, found)
    most = max(take for plan, _ in schedule(found, rows) for *_, take in plan)
    assert most * 1.2 + 2 <= 40 < balanced_rows([41 * 3] * len(available), found) * most / rows * 1.5


def test_features_without_the_centre_lose_nothing_and_others_do():
    found = design_of(2, 2)
    robust = performance_drop(features_of(found, 4, 0), found, 3, seed=0)
    confounded = performance_drop(features_of(found, 1.5, 8), found, 3, seed=0)
    assert robust.value is not None and confounded.value is not None and robust.accuracies is not None
    assert abs(robust.value) < 0.03
    assert confounded.value < -0.1
    assert robust.accuracies.shape == (SPLITS, 3)
    # PathoROB's formula, in plain numbers.
    accuracies = confounded.accuracies
    assert accuracies is not None
    drops = [accuracies[split, i] / accuracies[0, i] - 1 for split in range(1, SPLITS) for i in range(3)]
    assert confounded.value == pytest.approx(np.mean(drops))


def test_the_drop_is_a_function_of_the_seed():
    found = design_of(2, 2)
    features = features_of(found, 1, 2)
    first, again, other = (performance_drop(features, found, 2, seed).value for seed in (0, 0, 1))
    assert first == again != other


def test_no_patient_is_trained_and_tested_on():
    """Features that name the patient and the label together: only rows of known patients can be classified."""
    found = design_of(2, 2)
    features = np.eye(80)[2 * found.groups + found.labels]
    drop = performance_drop(features, found, 4, seed=0)
    assert drop.accuracies is not None
    assert np.abs(drop.accuracies - 0.5).max() < 0.1


def test_too_few_patients_or_rows_leave_it_undefined():
    one_each = design("centre", ["a", "b"] * 20, ["A"] * 20 + ["B"] * 20, ["p"] * 20 + ["q"] * 20)
    few_rows = design_of(2, 2, rows=24, patients=12)
    for found in (one_each, few_rows):
        drop = performance_drop(np.random.default_rng(0).normal(size=(len(found.labels), 4)), found, 2, seed=0)
        assert drop.value is None
        assert "of every class and centre" in drop.to_dict()["apd_undefined"]
