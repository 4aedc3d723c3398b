"""Accuracy, balanced accuracy and AUC; undefined values are None, never an exception."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Share of correct predictions; None without any.

    Args:
        truth: ``(M,)`` class numbers.
        predicted: ``(M,)`` class numbers.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    return float((truth == predicted).mean()) if len(truth) else None


def balanced_accuracy(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Mean recall over the classes that occur in ``truth``; None without any.

    Args:
        truth: ``(M,)`` class numbers.
        predicted: ``(M,)`` class numbers.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    recalls = [(predicted[truth == c] == c).mean() for c in np.unique(truth)]
    return float(np.mean(recalls)) if recalls else None


def auc(truth: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Area under the ROC curve.

    With two classes: of the second, the positive one. With more: the unweighted mean over one-vs-rest problems, one for
    each class that occurs in ``truth`` (a class without queries has no curve). Each area is the probability that a
    positive is ranked above a negative, ties counting half (Hanley & McNeil 1982).

    Args:
        truth: ``(M,)`` class numbers in ``[0, C)``.
        probabilities: ``(M, C)`` scores.

    Returns:
        The area; None where ``truth`` holds fewer than two classes.
    """
    truth, probabilities = np.asarray(truth), np.asarray(probabilities, dtype=np.float64)
    present = np.unique(truth)
    if len(present) < 2 or not np.isfinite(probabilities).all():
        return None
    if probabilities.shape[1] == 2:
        present = present[1:]
    return float(np.mean([_binary_auc(truth == c, probabilities[:, c]) for c in present]))


def _binary_auc(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[place]  # from 1; equal scores share the mean of their ranks
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    pairs_won = rank[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(pairs_won / (n_positive * n_negative))
