"""What robustness compares: rows by label, by a confounder such as the centre, and by patient."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino.environment import import_extra
from dino.errors import ConfigError, DataError
from dino.evaluate.statistics import Values

Numbers = NDArray[np.int64]

KINDS = ("SS", "SO", "OS", "OO")  # of neighbours: label and confounder, each the Same or Other
SS, SO, OS, OO = range(4)


@dataclass(frozen=True)
class Design:
    """The labels and confounders of N rows.

    Attributes:
        by: Name of the confounder: ``centre``, ``scanner``, ``stain``, ...
        labels: ``(N,)`` class numbers.
        classes: Names of the K classes.
        confounders: ``(N,)`` numbers of the confounder's values.
        values: Names of these C values.
        groups: ``(N,)`` number of the patient of each row.
    """

    by: str
    labels: Numbers
    classes: Sequence[str]
    confounders: Numbers
    values: Sequence[str]
    groups: Numbers

    @property
    def cells(self) -> Numbers:
        """``(N,)`` number of each row's combination of confounder and label."""
        return self.confounders * len(self.classes) + self.labels

    def kinds(self, rows: Numbers, neighbours: Numbers) -> Numbers:
        """Kind of neighbours of rows, a number in the order of :data:`KINDS`; the arguments are broadcast."""
        other_label = self.labels[rows] != self.labels[neighbours]
        other_confounder = self.confounders[rows] != self.confounders[neighbours]
        return 2 * other_label + other_confounder

    def candidates(self) -> Values:
        """``(N, 4)`` numbers of rows of other patients, of each kind of neighbour."""
        shape = self.groups.max() + 1, len(self.values), len(self.classes)
        counts = np.zeros(shape)
        np.add.at(counts, (self.groups, self.confounders, self.labels), 1)
        others = counts.sum(0) - counts[self.groups]  # (N, C, K), of other patients
        rows = np.arange(len(self.labels))
        same = others[rows, self.confounders, self.labels]
        of_label = others.sum(1)[rows, self.labels]
        of_confounder = others.sum(2)[rows, self.confounders]
        total = others.sum((1, 2))
        return np.stack([same, of_label - same, of_confounder - same, total - of_label - of_confounder + same], 1)


def design(by: str, labels: Sequence[str], confounders: Sequence[str], groups: Sequence[str]) -> Design:
    """The design of N rows, if robustness is defined for it.

    Args:
        by: Name of the confounder.
        labels: ``(N,)`` class of each row.
        confounders: ``(N,)`` value of the confounder of each row.
        groups: ``(N,)`` patient of each row.

    Raises:
        DataError: If the confounder has one value only, a value has rows of one class only, or a class has rows of one
            value only.
    """
    pairs = set(zip(confounders, labels, strict=True))
    values, classes = sorted(set(confounders)), sorted(set(labels))
    if len(values) < 2:
        raise DataError(
            f"expected at least two values of {by}, which robustness compares, found only '{values[0]}': add rows of "
            f"another {by}, or compare another column"
        )
    for value in values:
        own = [name for name in classes if (value, name) in pairs]
        if len(own) < 2:
            raise DataError(
                f"expected rows of at least two classes from every {by}, found only class '{own[0]}' from {by} "
                f"'{value}', so that label and {by} cannot be told apart there: remove its rows, or add other classes"
            )
    for name in classes:
        own = [value for value in values if (value, name) in pairs]
        if len(own) < 2:
            raise DataError(
                f"expected every class from at least two values of {by}, found class '{name}' only from {by} "
                f"'{own[0]}', so that its rows have no neighbour of their class and another {by}: remove them, or add "
                f"rows of another {by}"
            )
    return Design(by, _numbers(labels, classes), classes, _numbers(confounders, values), values, _numbers(groups))


def check_neighbours(found: Design, k: Sequence[int], m: int) -> None:
    """Check that every row has as many neighbours of other patients as are needed.

    Args:
        found: The rows.
        k: Candidates of the number of neighbours of RI and MaRI.
        m: Number of neighbours of each kind of CRoMa.

    Raises:
        ConfigError: If a number is not positive.
        DataError: If a row has too few neighbours.
    """
    if not k or min(k) < 1 or m < 1:
        raise ConfigError(f"expected at least one k, each 1 or more, and m of 1 or more, found k={list(k)} and m={m}")
    candidates = found.candidates()
    fewest = int(candidates.sum(1).min())
    if fewest < max(k):
        raise DataError(
            f"expected at least k={max(k)} rows of other patients for every row, found {fewest}: give smaller k=[...], "
            "or more rows"
        )
    wanted = {SO: f"of the same class and another {found.by}", OS: f"of another class and the same {found.by}"}
    for kind, words in wanted.items():
        row = int(candidates[:, kind].argmin())
        if candidates[row, kind] < m:
            raise DataError(
                f"expected at least m={m} rows of other patients {words} for every row, found "
                f"{int(candidates[row, kind])} for class '{found.classes[found.labels[row]]}' and {found.by} "
                f"'{found.values[found.confounders[row]]}': give a smaller m, or more rows"
            )


def _numbers(names: Sequence[str], order: Sequence[str] = ()) -> Numbers:
    number = {name: i for i, name in enumerate(order or dict.fromkeys(names))}
    return np.array([number[name] for name in names], np.int64)


def import_croma() -> Any:
    """The package croma.

    Raises:
        ConfigError: If it is not installed.
    """
    return import_extra("croma", "robustness", "evaluate")


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without warnings: croma's are in the details of a result, scikit-learn's of slow convergence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
