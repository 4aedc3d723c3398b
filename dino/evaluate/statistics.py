"""Statistics of scored rows as functions of the rows' weights, and their bootstrap over patients.

A statistic maps weights ``(R, M)`` of the M scored rows to R values. Weights of one give its value on the data, and the
numbers of times that a bootstrap sample holds each row give its value on that sample. So one function defines both, all
models are resampled alike, and differences between models are paired.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dino import randomness

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]

RESAMPLES = 1000
WEIGHTS_AT_ONCE = 1 << 23  # 64 MB


@dataclass(frozen=True)
class Scored:
    """What an evaluator found for the features of one model.

    Attributes:
        rows: ``(M,)`` indices of the scored rows of the table, the same for every model.
        statistics: Of these rows, by name.
        details: Whatever else is worth recording, as plain values: the chosen strength, counts, ...
        primary: The statistic that figures and comparisons show; empty for the first one.
    """

    rows: NDArray[np.int64]
    statistics: Mapping[str, Statistic]
    details: Mapping[str, Any] = field(default_factory=dict)
    primary: str = ""


@dataclass(frozen=True)
class Resampled:
    """A statistic of the data and of each bootstrap sample.

    Attributes:
        value: Of the data; NaN where it is undefined.
        values: ``(R,)``, of the samples; NaN where it is undefined.
    """

    value: float
    values: Values


def mean(values: ArrayLike) -> Statistic:
    """The weighted mean of ``values`` (M,)."""
    numbers = np.asarray(values, np.float64)

    def statistic(weights: Values) -> Values:
        return divide(weights @ numbers, weights.sum(1))

    return statistic


def constant(value: float) -> Statistic:
    """The same value for all weights."""
    return lambda weights: np.full(len(weights), value)


def accuracy(truth: ArrayLike, predicted: ArrayLike) -> Statistic:
    """Share of the rows that are predicted correctly.

    Args:
        truth: ``(M,)`` class numbers.
        predicted: ``(M,)`` class numbers.
    """
    return mean(np.asarray(truth) == np.asarray(predicted))


def balanced_accuracy(truth: ArrayLike, predicted: ArrayLike) -> Statistic:
    """Mean recall of the classes that a sample holds; arguments as in :func:`accuracy`."""
    return class_mean(truth, np.asarray(truth) == np.asarray(predicted))


def class_mean(truth: ArrayLike, values: ArrayLike) -> Statistic:
    """Mean over the classes that a sample holds of the weighted mean of ``values`` (M,) within each class (M,)."""
    truth = np.asarray(truth)
    member = (truth == np.unique(truth)[:, None]).astype(np.float64)  # (C, M)
    sums = member * np.asarray(values, np.float64)

    def statistic(weights: Values) -> Values:
        return nanmean(divide(weights @ sums.T, weights @ member.T))  # (R, C)

    return statistic


def auc(truth: ArrayLike, probabilities: ArrayLike) -> Statistic:
    """Area under the ROC curve, as :func:`dino.evaluate.metrics.auc` defines it: ties count half.

    With two classes it is that of the second. With more it is the unweighted mean over the classes of which a sample
    holds both members and others.

    Args:
        truth: ``(M,)`` class numbers in ``[0, C)``.
        probabilities: ``(M, C)`` scores.
    """
    truth, probabilities = np.asarray(truth), np.asarray(probabilities, np.float64)
    classes = [1] if probabilities.shape[1] == 2 else [int(c) for c in np.unique(truth)]
    areas = [_binary_auc(truth == c, probabilities[:, c]) for c in classes]

    def statistic(weights: Values) -> Values:
        return nanmean(np.stack([area(weights) for area in areas], 1))

    return statistic


def mean_of_parts(parts: Sequence[NDArray[np.int64]], make: Callable[[NDArray[np.int64]], Statistic]) -> Statistic:
    """The mean of a statistic over parts of the rows, such as the test rows of each fold.

    Args:
        parts: Positions of the rows of each part.
        make: The statistic of the rows of one part; a sample in which it is undefined is a mean of the other parts.
    """
    made = [(part, make(part)) for part in parts]

    def statistic(weights: Values) -> Values:
        return nanmean(np.stack([one(weights[:, part]) for part, one in made], 1))

    return statistic


def _binary_auc(positive: NDArray[np.bool_], score: Values) -> Statistic:
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.nan))  # of each group of equal scores; the first is 0
    sign = positive[order]

    def statistic(weights: Values) -> Values:
        ordered = weights[:, order]
        positives = np.add.reduceat(ordered * sign, starts, axis=1)  # (R, groups of equal scores)
        negatives = np.add.reduceat(ordered * ~sign, starts, axis=1)
        below = negatives.cumsum(1) - negatives / 2
        return divide((positives * below).sum(1), positives.sum(1) * negatives.sum(1))

    return statistic


def bootstrap(
    statistics: Mapping[str, Statistic], groups: Sequence[Hashable], count: int = RESAMPLES, seed: int = 0
) -> dict[str, Resampled]:
    """Statistics of the data and of ``count`` bootstrap samples of whole groups.

    The samples depend on the groups, ``count`` and ``seed`` alone: calls for several models give paired values.

    Args:
        statistics: By name.
        groups: ``(M,)`` the patient (or slide) of each scored row.
        count: Number of samples.
        seed: Seed of the samples.
    """
    whole = np.ones((1, len(groups)))
    values: dict[str, list[Values]] = {name: [] for name in statistics}
    for weights in resamples(groups, count, seed):
        for name, statistic in statistics.items():
            values[name].append(statistic(weights))
    empty = np.zeros(0)
    return {
        name: Resampled(float(statistic(whole)[0]), np.concatenate(values[name]) if values[name] else empty)
        for name, statistic in statistics.items()
    }


def resamples(groups: Sequence[Hashable], count: int, seed: int) -> Iterator[Values]:
    """Weights of the rows in bootstrap samples of whole groups, a few samples at a time.

    A sample draws as many groups as there are, with replacement; the weight of a row is how often its group was drawn.

    Args:
        groups: ``(M,)`` group of each row.
        count: Number of samples R in all.
        seed: Seed.

    Yields:
        ``(r, M)`` weights; the r add up to ``count``. Nothing where there are fewer than two groups.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    of_row = np.array([names[name] for name in groups])
    if len(names) < 2:
        return
    generator = randomness.generator(seed, 0, "bootstrap")
    size = max(1, WEIGHTS_AT_ONCE // len(of_row))
    for start in range(0, count, size):
        drawn = generator.integers(0, len(names), (min(size, count - start), len(names)))
        shifted = drawn + np.arange(len(drawn))[:, None] * len(names)
        times = np.bincount(shifted.ravel(), minlength=drawn.size).reshape(drawn.shape)
        yield times[:, of_row].astype(np.float64)


def divide(numerator: Values, denominator: Values) -> Values:
    """The quotient; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def nanmean(values: Values) -> Values:
    """Mean of each row of ``(R, C)`` over what is not NaN; NaN where all is."""
    known = ~np.isnan(values)
    return divide(np.where(known, values, 0).sum(1), known.sum(1).astype(np.float64))
