"""Predictions of slides from their features: how models are chosen and tested, and mean pooling with a linear model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dino.evaluate.outcomes import Outcome
from dino.evaluate.statistics import Scored, Values
from dino.evaluate.task import Fold, Rows, grouped_folds, groups_per_class, single_fold


class Method(Protocol):
    """A way to predict outcomes from features, with some candidates for the strength of its regularisation."""

    candidates: Sequence[Mapping[str, float]]  # settings of each, from the strongest regularisation

    def errors(self, train: Rows, validation: Rows) -> Values:
        """``(candidates,)`` error of predictions of validation rows by models of the train rows."""
        ...

    def predict(self, train: Rows, test: Rows, candidate: int) -> Values:
        """``(n, P)`` predictions of test rows by a model of the train rows."""
        ...


class LinearModel:
    """A penalised linear model of one vector per case, such as the mean of its instances.

    Args:
        outcome: What is predicted.
        vectors: ``(M, D)`` float64.
    """

    def __init__(self, outcome: Outcome, vectors: Values) -> None:
        self.outcome, self.vectors = outcome, vectors
        self.candidates: Sequence[Mapping[str, float]] = [{"penalty": penalty} for penalty in outcome.penalties]

    def errors(self, train: Rows, validation: Rows) -> Values:
        """See :class:`Method`."""
        every = range(len(self.candidates))
        return np.array([self.outcome.error(self.predict(train, validation, one), validation) for one in every])

    def predict(self, train: Rows, test: Rows, candidate: int) -> Values:
        """See :class:`Method`."""
        return self.outcome.fit(self.vectors, train, self.outcome.penalties[candidate])(test)


class NoFeatures:
    """The best constant, as a method that needs no features.

    Args:
        outcome: What is predicted.
    """

    candidates: Sequence[Mapping[str, float]] = ({},)

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def errors(self, train: Rows, validation: Rows) -> Values:
        """See :class:`Method`."""
        return np.zeros(1)

    def predict(self, train: Rows, test: Rows, candidate: int) -> Values:
        """See :class:`Method`."""
        return np.tile(self.outcome.constant(train), (len(test), 1))


def cross_validate(
    outcome: Outcome,
    folds: Sequence[Fold],
    inner: Sequence[Sequence[Fold]],
    method: Method,
    advance: Callable[[], None] = lambda: None,
) -> Scored:
    """Predict the test rows of each fold by a model of its train rows, and score all predictions.

    Args:
        outcome: What is predicted.
        folds: The folds.
        inner: For each fold, the folds of its train rows that choose a candidate, see :func:`inner_folds`.
        method: How to predict.
        advance: Called after each inner split and each fold.
    """
    chosen, predicted = [], []
    for fold, splits in zip(folds, inner, strict=True):
        chosen.append(_choose(method, splits, advance))
        predicted.append(method.predict(fold.train, fold.test, chosen[-1]))
        advance()
    rows = np.concatenate([fold.test for fold in folds])
    ends = np.cumsum([len(fold.test) for fold in folds])
    parts = [np.arange(end - len(fold.test), end) for fold, end in zip(folds, ends, strict=True)]
    details: dict[str, Any] = {"chosen": [dict(method.candidates[candidate]) for candidate in chosen]}
    return Scored(rows, outcome.statistics(np.concatenate(predicted), rows, parts), details)


def inner_folds(fold: Fold, outcome: Outcome, groups: Sequence[str], count: int, seed: int) -> list[Fold]:
    """Splits of a fold's train rows that choose the regularisation; test rows play no part.

    Args:
        fold: A fold. If it has validation rows, they are predicted from its train rows.
        outcome: What is predicted.
        groups: ``(M,)`` patient of each row.
        count: Number of splits; fewer where a class has fewer patients, none where it has but one.
        seed: Seed.
    """
    if len(fold.validation):
        return [single_fold(fold.train, fold.validation)]
    rows = [int(row) for row in fold.train]
    patients = [groups[row] for row in rows]
    count = min(count, *groups_per_class(outcome.strata_of(rows, patients, count), patients).values())
    if count < 2:
        return []
    strata = outcome.strata_of(rows, patients, count)
    splits = [
        single_fold(fold.train[split.train], fold.train[split.test])
        for split in grouped_folds(strata, patients, count, seed)
    ]
    return [split for split in splits if not outcome.lacking(split.train)]


def _choose(method: Method, splits: Sequence[Fold], advance: Callable[[], None]) -> int:
    """The candidate with the smallest mean error over validation rows, the strongest regularisation among equals."""
    count = len(method.candidates)
    if count == 1 or not splits:
        return count // 2
    found = []
    for split in splits:
        found.append(method.errors(split.train, split.test))
        advance()
    errors = np.stack(found)  # (splits, candidates)
    sizes = np.array([len(split.test) for split in splits], np.float64)[:, None]
    known = ~np.isnan(errors)
    total = np.where(known, sizes, 0).sum(0)
    mean = np.where(known, errors * sizes, 0).sum(0) / np.where(total > 0, total, np.nan)
    return count // 2 if np.isnan(mean).all() else int(np.nanargmin(mean))
