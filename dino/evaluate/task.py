"""What a set of features is scored on: class numbers, patients, and which rows are trained and tested on."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dino import files
from dino.errors import DataError

Rows = NDArray[np.int64]
FOLD_COLUMNS = ("name", "fold")


@dataclass(frozen=True)
class Fold:
    """Rows that a classifier is trained on, and rows that it is tested on.

    Attributes:
        train: Indices of rows.
        test: Indices of rows, of other patients.
        validation: Indices of rows that choose the regularisation; empty: folds of ``train`` do.
    """

    train: Rows
    test: Rows
    validation: Rows


@dataclass(frozen=True)
class Task:
    """The labels of N rows, and how they are split.

    Attributes:
        truth: ``(N,)`` class numbers.
        classes: Names of the classes.
        groups: ``(N,)`` patient of each row; where patients are unknown its slide, else the row itself.
        folds: One for a table with partitions, else those of a cross-validation.
        seed: Seed of whatever an evaluator draws.
    """

    truth: Rows
    classes: Sequence[str]
    groups: Sequence[str]
    folds: Sequence[Fold]
    seed: int = 0

    @property
    def tested(self) -> Rows:
        """Rows that are tested in any fold, in the order of the folds."""
        return np.concatenate([fold.test for fold in self.folds])


def single_fold(train: ArrayLike, test: ArrayLike, validation: ArrayLike = ()) -> Fold:
    """A fold of indices of rows."""
    return Fold(*(np.asarray(rows, np.int64) for rows in (train, test, validation)))


def grouped_folds(labels: Sequence[str], groups: Sequence[str], folds: int, seed: int) -> list[Fold]:
    """Folds of a cross-validation: stratified by label, no group on both sides.

    Args:
        labels: ``(N,)`` label of each row.
        groups: ``(N,)`` patient of each row.
        folds: Number of folds.
        seed: Seed.

    Raises:
        DataError: If there are fewer groups than folds, in all or of a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    of_class = groups_per_class(labels, groups)
    rarest = min(of_class, key=lambda label: (of_class[label], label))
    if folds < 2 or of_class[rarest] < folds:
        raise DataError(
            f"expected at least 2 folds and as many patients (or slides) of every class as folds, found {folds} folds "
            f"and {of_class[rarest]} of class '{rarest}': give fewer folds, more patients, or a partition column"
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = splitter.split(np.zeros(len(labels)), np.asarray(labels), np.asarray(groups))
    return [single_fold(train, test) for train, test in parts]


def groups_per_class(labels: Sequence[str], groups: Sequence[str]) -> dict[str, int]:
    """Number of patients of each class."""
    return dict(Counter(label for label, _ in set(zip(labels, groups, strict=True))))


def write_folds(path: Path, names: Sequence[str], folds: Sequence[Fold]) -> None:
    """Write the fold in which each row is tested as CSV; :func:`read_folds` reads it again.

    Args:
        path: The CSV.
        names: ``(N,)`` unique name of each row: the image, slide or patient.
        folds: The folds.
    """
    lines = [[names[row], str(number)] for number, fold in enumerate(folds) for row in fold.test]
    files.write_text(path, files.csv_text([FOLD_COLUMNS, *lines]))


def read_folds(path: Path, names: Sequence[str]) -> list[Fold]:
    """The folds that :func:`write_folds` wrote.

    Args:
        path: The CSV.
        names: Name of each row, as it was written.

    Raises:
        DataError: If the file cannot be read, or does not name every row once.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(row["name"], int(row["fold"])) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"expected a table of folds at {path}, with columns {', '.join(FOLD_COLUMNS)} as an evaluation writes it, "
            f"could not read it: {error!r}"
        ) from None
    fold_of = {**dict(rows), **{name[1:]: fold for name, fold in rows if name[:1] == "'"}}  # see files.csv_text
    lacking = [name for name in names if name not in fold_of]
    if lacking or len(rows) != len(names) or len(set(fold_of.values())) < 2:
        example = f"; no fold of {lacking[0]}" if lacking else ""
        raise DataError(
            f"{path}: expected a fold, of at least two, for each of the {len(names)} rows of the labels, found "
            f"{len(rows)} rows in {len(set(fold_of.values()))} folds{example}: give the labels that it was made for"
        )
    of_row = np.array([fold_of[name] for name in names])
    numbers = sorted(set(of_row.tolist()))
    return [single_fold(np.flatnonzero(of_row != number), np.flatnonzero(of_row == number)) for number in numbers]
