"""APD, the average performance drop: what an association of label and confounder in training data costs a classifier.

In a balanced training set every class has as many rows of every value of the confounder. Towards the last split, rows
move, until each class has rows of its own values only, as if every centre had sent one diagnosis. A logistic regression
is fitted to each split, and tested on the same balanced rows of other patients. APD is the mean over the splits of the
accuracy's relative change (Kömen et al. 2025, arXiv 2507.17845, whose classifier, choice of its regularisation and
formula the package ``croma`` contains). It is 0 for features in which the classifier finds the label without the
confounder, and negative otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino import randomness
from dino.evaluate.confounders import Design, Numbers, import_croma, without_warnings

SPLITS = 5  # the training sets, from balanced to completely associated
VALIDATION = 0.2  # further rows of each training set, as a fraction, that choose the regularisation
MAX_ROWS = 100  # of each class and value in the balanced set
MIN_ROWS = 5  # of the same: with fewer, the splits would be equal
TEST_FOLDS = 4  # one of these folds of the patients is tested

SplitPlan = tuple[
    list[tuple[int, int, int]], int
]  # of croma: (confounder, label, rows) of each cell, and the most rows


@dataclass(frozen=True)
class PerformanceDrop:
    """APD and what it is computed from.

    Attributes:
        value: APD; None where it is undefined.
        reason: Why it is undefined.
        accuracies: ``(SPLITS, R)`` balanced accuracies of the R repetitions.
        rows: Rows of each class and value in the balanced training set, the fewest of all repetitions.
    """

    value: float | None
    reason: str = ""
    accuracies: NDArray[np.float64] | None = None
    rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the details of a result."""
        if self.value is None or self.accuracies is None:
            return {"apd_undefined": self.reason}
        means, deviations = self.accuracies.mean(1), self.accuracies.std(1)
        return {
            "apd_rows": self.rows,
            "apd_accuracies": [round(float(value), 6) for value in means],
            "apd_standard_deviations": [round(float(value), 6) for value in deviations],
        }


def performance_drop(features: NDArray[Any], found: Design, repetitions: int, seed: int) -> PerformanceDrop:
    """APD of features.

    Args:
        features: ``(N, D)`` finite features.
        found: The rows.
        repetitions: Number of repetitions, each with other training and test patients.
        seed: Seed of the choice.

    Raises:
        ConfigError: If ``croma`` is not installed.
    """
    croma = import_croma()
    from croma.downstream import probe_sweep_over_test_sets

    features = np.asarray(features, np.float64)
    columns, fewest = [], MAX_ROWS
    for repetition in range(repetitions):
        generator = randomness.generator(seed, repetition, "performance drop")
        parts = _split_patients(found, generator)
        rows = balanced_rows([len(part) for part in parts[0]], found) if parts else 0
        if not parts or rows < MIN_ROWS:
            return PerformanceDrop(
                None,
                f"expected at least two patients, and {MIN_ROWS} to 20 rows for training, of every class and "
                f"{found.by}, found fewer",
            )
        train, test = np.concatenate(parts[0]), np.concatenate(parts[1])
        with without_warnings():
            accuracies = probe_sweep_over_test_sets(
                features[train],
                found.confounders[train],
                found.labels[train],
                schedule=schedule(found, rows),
                test_sets={"other patients": (features[test], found.labels[test])},
                iterations=1,
                validation_fraction=VALIDATION,
                arrange_slides=lambda cells, _: cells,  # the rows are in a random order of patients
            )
        columns.append(accuracies["other patients"])
        fewest = min(fewest, rows)
    matrix = np.concatenate(columns, axis=1)  # (SPLITS, R)
    return PerformanceDrop(croma.apd(matrix), accuracies=matrix, rows=fewest)


def own_cells(found: Design) -> NDArray[np.bool_]:
    """``(C, K)``: which values of the confounder are those of which class where both are completely associated.

    Every class has at least one, and every value is one class's, or, with more classes than values, several classes'.
    """
    values, classes = len(found.values), len(found.classes)
    own = np.zeros((values, classes), bool)
    for i in range(max(values, classes)):
        own[i * values // max(values, classes), i * classes // max(values, classes)] = True
    return own


def schedule(found: Design, rows: int) -> list[SplitPlan]:
    """Numbers of training rows of every value and class, in each split.

    A class has the same number of rows in every split: with strength t from 0 to 1, ``rows (1 - t)`` of each value that
    is not its own, and what that takes away is shared by its own values.

    Args:
        found: The rows.
        rows: Rows of each value and class in the balanced split.
    """
    own = own_cells(found)
    gain = (~own).sum(0) / own.sum(0)  # (K,)
    plans = []
    for strength in np.linspace(0, 1, SPLITS):
        takes = np.floor(rows * np.where(own, 1 + strength * gain, 1 - strength) + 1e-9).astype(int)  # (C, K)
        plans.append([(i, j, int(takes[i, j])) for i, j in np.ndindex(*own.shape)])
    most = max(take for plan in plans for *_, take in plan)
    return [(plan, most) for plan in plans]


def balanced_rows(available: Sequence[int], found: Design) -> int:
    """The most rows of each value and class in the balanced split for which the last split has enough.

    Args:
        available: ``(C * K,)`` numbers of rows for training, in the order of :attr:`Design.cells`.
        found: The rows.
    """
    own = own_cells(found)
    most = np.where(own, 1 + (~own).sum(0) / own.sum(0), 1)  # of one row of the balanced split
    # croma keeps a row of the largest cell behind those for training and validation for a test of its own.
    counts = (np.reshape(available, own.shape) - 3) / (1 + VALIDATION) / most
    return min(int(counts.min()), MAX_ROWS)


def _split_patients(found: Design, generator: np.random.Generator) -> tuple[list[Numbers], list[Numbers]] | None:
    """Rows for training and for testing of every class and value, of different patients.

    Training rows are in a random order of patients, whose rows are together; test rows are equally many of each class
    and value. None where a class and value would have none.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(TEST_FOLDS, len(np.unique(found.groups)))
    if folds < 2:
        return None
    cells, place = found.cells, generator.permutation(int(found.groups.max()) + 1)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=int(generator.integers(1 << 31)))
    with without_warnings():  # of cells with fewer rows than folds
        splits = list(splitter.split(cells, cells, found.groups))
    number = len(found.values) * len(found.classes)
    for train, test in splits:
        shuffled = generator.permutation(train)
        ordered = shuffled[np.argsort(place[found.groups[shuffled]], kind="stable")]
        tested = generator.permutation(test)
        of_cell = [tested[cells[tested] == cell] for cell in range(number)]
        fewest = min(map(len, of_cell))
        parts = [ordered[cells[ordered] == cell] for cell in range(number)]
        if fewest and min(map(len, parts)):
            return parts, [rows[: min(fewest, MAX_ROWS)] for rows in of_cell]
    return None
