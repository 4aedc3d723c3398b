"""Evaluators of labelled tiles: functions of features and a task, which know no model."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dino import randomness
from dino.errors import DataError
from dino.evaluate import statistics
from dino.evaluate.knn import weighted_knn
from dino.evaluate.logistic import BlockedLogisticRegression
from dino.evaluate.statistics import Scored, Statistic, Values
from dino.evaluate.task import Fold, Rows, Task, grouped_folds, groups_per_class

Features = NDArray[Any]  # (N, D) float16 or float32, maybe a memory map

FIXED_STRENGTH = 0.01
SELECTION_FOLDS = 3
SELECTION_ROWS = 50_000  # at most, to choose the strength
ITERATIONS = 300  # of lbfgs, at most
RANKED_AT_ONCE = 1 << 24
ROWS_AT_ONCE = 1 << 14
IN_MEMORY = 1 << 30  # bytes of standardised features that scikit-learn is given at once
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------- classifiers


def knn(features: Features, task: Task, k: Sequence[int], temperature: float, device: torch.device = CPU) -> Scored:
    """Weighted k-nearest neighbours (:func:`dino.evaluate.knn.weighted_knn`).

    Args:
        features: ``(N, D)``.
        task: Labels and folds.
        k: Numbers of neighbours.
        temperature: Temperature of the votes.
        device: Where to compute.
    """
    votes: dict[int, list[Values]] = {count: [] for count in k}
    for fold in task.folds:
        reference, query = (_Vectors(features, rows, device) for rows in (fold.train, fold.test))
        labels = torch.from_numpy(task.truth[fold.train])
        found = weighted_knn(reference, labels, query, k, temperature, len(task.classes))
        for count, probabilities in found.items():
            votes[count].append(probabilities.cpu().numpy())
    scores: dict[str, Statistic] = {}
    for count, parts in votes.items():
        scores |= classification(task, np.concatenate(parts), f"knn_{count}_")
    return Scored(task.tested, scores)


def linear(features: Features, task: Task, strengths: Sequence[float], device: torch.device = CPU) -> Scored:
    """Linear probe: L2-regularised multinomial logistic regression on standardised features.

    scikit-learn fits it; where standardised training features are more than :data:`IN_MEMORY` bytes,
    :class:`dino.evaluate.logistic.BlockedLogisticRegression` does, which reads them in blocks.

    The strength ``C`` is the one with the highest balanced accuracy on the validation rows, or where there are none in
    a cross-validation within the training rows, grouped by patient; the smallest of equals. The first fit that
    does not converge ends the search. Where a class is of one patient ``C`` cannot be chosen, and is 1.

    Args:
        features: ``(N, D)``.
        task: Labels and folds.
        strengths: Values of ``C`` to choose from (the inverse of the regularisation).
        device: Where features that are read in blocks are computed with.
    """
    probabilities, chosen = [], []
    for fold in task.folds:
        strength = _choose_strength(features, task, fold, strengths, device)
        predict = fit_linear(features, task.truth, fold.train, strength, len(task.classes), device)
        probabilities.append(predict(fold.test))
        chosen.append(strength)
    return Scored(task.tested, classification(task, np.concatenate(probabilities)), {"strengths": chosen})


def linear_accuracy(features: Features, truth: Rows, train: Rows, test: Rows) -> float:
    """Accuracy of a linear probe of a fixed strength, for comparisons of one network with itself.

    Args:
        features: ``(N, D)``.
        truth: ``(N,)`` class numbers.
        train: Indices of the training rows.
        test: Indices of the test rows.
    """
    probabilities = fit_linear(features, truth, train, FIXED_STRENGTH, int(truth.max()) + 1)(test)
    return float((probabilities.argmax(1) == truth[test]).mean())


def fit_linear(
    features: Features, truth: Rows, rows: Rows, strength: float, classes: int, device: torch.device = CPU
) -> Callable[[Rows], Values]:
    """Fit a logistic regression on standardised features of ``rows``.

    Args:
        features: ``(N, D)``.
        truth: ``(N,)`` class numbers.
        rows: Indices of the training rows.
        strength: ``C`` of scikit-learn.
        classes: Number of classes C.
        device: As for :func:`linear`.

    Returns:
        A function of indices ``(M,)`` to probabilities ``(M, C)``; 0 for a class without a training row.

    Raises:
        DataError: If the training rows are of one class.
    """
    probe = _LinearPath(features, truth, rows, classes, device)
    probe.fit(strength)
    return probe.predict


class _LinearPath:
    """Logistic regressions of the same rows, each fitted from the last one.

    Raises:
        DataError: If the training rows are of one class.
    """

    def __init__(self, features: Features, truth: Rows, rows: Rows, classes: int, device: torch.device) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        self.features, self.labels, self.classes = features, truth[rows], classes
        if len(np.unique(self.labels)) < 2:
            raise DataError("expected training rows of at least two classes, found one; give more rows or other folds")
        self.scaler = StandardScaler(copy=False)
        for part in _blocks(rows):  # whole, it needs float64 copies
            self.scaler.partial_fit(_array(features, part))
        self.inputs: NDArray[np.float32] | None = None
        if 4 * len(rows) * features.shape[1] > IN_MEMORY:
            mean, scale = np.asarray(self.scaler.mean_), np.asarray(self.scaler.scale_)
            self.model = BlockedLogisticRegression(_Vectors(features, rows, device), mean, scale, ITERATIONS)
        else:
            self.inputs = np.asarray(self.scaler.transform(_array(features, rows)))
            self.model = LogisticRegression(max_iter=ITERATIONS, warm_start=True)

    def fit(self, strength: float) -> bool:
        """Fit with ``C`` of scikit-learn; whether it converged."""
        from sklearn.exceptions import ConvergenceWarning

        if isinstance(self.model, BlockedLogisticRegression):
            return self.model.fit(self.labels, strength)
        self.model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(self.inputs, self.labels)
        return bool(self.model.n_iter_.max() < ITERATIONS)

    def predict(self, test: Rows) -> Values:
        """Probabilities ``(M, C)`` of rows ``(M,)``."""
        found = np.zeros((len(test), self.classes))
        inputs = (np.asarray(self.scaler.transform(_array(self.features, part))) for part in _blocks(test))
        found[:, self.model.classes_] = np.concatenate([self.model.predict_proba(part) for part in inputs])
        return found


def _choose_strength(
    features: Features, task: Task, fold: Fold, strengths: Sequence[float], device: torch.device
) -> float:
    """The ``C`` with the highest balanced accuracy on held-out rows of the training part.

    Values are tried from the smallest one on. A fit that does not converge ends the search: the larger ones regularise
    even less.
    """
    if len(strengths) == 1:
        return strengths[0]
    if len(fold.validation):
        splits = [(fold.train, fold.validation)]
    else:
        drawn = randomness.generator(task.seed, 0, "strength").permutation(fold.train)[:SELECTION_ROWS]
        drawn.sort()
        labels, groups = [str(label) for label in task.truth[drawn]], [task.groups[int(row)] for row in drawn]
        number = min(SELECTION_FOLDS, *groups_per_class(labels, groups).values())
        if number < 2:
            return 1.0
        folds = grouped_folds(labels, groups, number, task.seed)
        splits = [(drawn[part.train], drawn[part.test]) for part in folds]
    paths = [_LinearPath(features, task.truth, known, len(task.classes), device) for known, _ in splits]
    scores: dict[float, float] = {}
    for strength in sorted(strengths):
        converged = [path.fit(strength) for path in paths]
        if scores and not all(converged):
            break
        found = []
        for path, (_, held_out) in zip(paths, splits, strict=True):
            predicted = path.predict(held_out).argmax(1)
            found.append(statistics.balanced_accuracy(task.truth[held_out], predicted)(np.ones((1, len(held_out))))[0])
        scores[strength] = float(np.mean(found))
    return max(scores, key=lambda strength: (scores[strength], -strength))


def fewshot(features: Features, task: Task, shots: Sequence[int], draws: int) -> Scored:
    """Nearest class mean of a few drawn examples per class, in the mean over draws.

    SimpleShot (Wang et al. 2019, arXiv 1911.04623), variant CL2N: features less the mean of the drawn examples, scaled
    to length 1, are assigned to the class with the nearest mean.

    Args:
        features: ``(N, D)``.
        task: Labels and folds.
        shots: Examples per class.
        draws: Number of draws of examples for each fold.

    Raises:
        DataError: If a class has fewer training rows than the least of ``shots``.
    """
    used, correct = _possible_shots(task, shots), {}
    for shot in used:
        parts, means = [], []
        for number, fold in enumerate(task.folds):
            of_class = [fold.train[task.truth[fold.train] == label] for label in range(len(task.classes))]
            test, truth = _array(features, fold.test), task.truth[fold.test]
            right = np.zeros(len(truth))
            for draw in range(draws):
                generator = randomness.generator(task.seed, draw, f"few-shot/{number}/{shot}")
                examples = np.stack([_array(features, generator.choice(own, shot, False)) for own in of_class])
                hits = _nearest_class(examples, test) == truth
                right += hits
                means.append(hits.mean())
            parts.append(right / draws)
        correct[shot] = np.concatenate(parts), float(np.std(means))
    truth = task.truth[task.tested]
    scores = {
        f"fewshot_{shot}_balanced_accuracy": statistics.class_mean(truth, right) for shot, (right, _) in correct.items()
    }
    deviations = {str(shot): deviation for shot, (_, deviation) in correct.items()}
    details = {"deviation_of_accuracy_between_draws": deviations, "draws": draws}
    return Scored(task.tested, scores, details, primary=list(scores)[-1])


def _possible_shots(task: Task, shots: Sequence[int]) -> list[int]:
    rarest = min(int(np.bincount(task.truth[fold.train], minlength=len(task.classes)).min()) for fold in task.folds)
    used = [shot for shot in sorted(set(shots)) if shot <= rarest]
    if not used or min(shots) < 1:
        raise DataError(
            f"expected at least {max(1, min(shots))} training rows of every class, found {rarest} of the rarest one; "
            "give fewer shots or more rows"
        )
    return used


def _nearest_class(examples: NDArray[np.float32], test: NDArray[np.float32]) -> Rows:
    """Class of each of ``test`` (M, D) by the means of ``examples`` (C, shots, D)."""
    centre = examples.mean((0, 1))
    means = _unit(examples - centre).mean(1)  # (C, D)
    tested = _unit(test - centre)
    return (2 * tested @ means.T - (means**2).sum(1)).argmax(1)  # of the smallest squared distance


# ---------------------------------------------------------------------------------- without a classifier


def retrieval(features: Features, task: Task, k: Sequence[int]) -> Scored:
    """Retrieval of rows of the same class among those of other patients, by cosine similarity.

    Each tested row is a query. Its candidates are the training rows, or in a cross-validation all rows, less those of
    its own patient.

    Args:
        features: ``(N, D)``.
        task: Labels and folds.
        k: Numbers of candidates that are looked at.

    Returns:
        ``map`` (the mean over queries of the average precision over all candidates), ``top_<k>`` (share of the queries
        with a hit among the first k) and ``precision_<k>`` (share of hits among the first k). A query without a
        candidate of its class counts as 0.
    """
    patients = np.unique(np.asarray(task.groups, dtype=object).astype(str), return_inverse=True)[1]
    found: dict[str, list[NDArray[Any]]] = {}
    for fold in task.folds:
        candidates = fold.train if len(task.folds) == 1 else np.arange(len(task.truth))
        reference = _unit_tensor(features, candidates)
        size = max(1, RANKED_AT_ONCE // max(1, len(candidates)))
        for start in range(0, len(fold.test), size):
            rows = fold.test[start : start + size]
            similarity = _unit_tensor(features, rows) @ reference.T  # (m, candidates)
            similarity[torch.from_numpy(patients[rows][:, None] == patients[candidates])] = -torch.inf
            order = torch.argsort(similarity, stable=True, dim=1, descending=True).numpy()
            allowed = np.take_along_axis(similarity.numpy(), order, 1) > -np.inf
            hits = (task.truth[candidates][order] == task.truth[rows][:, None]) & allowed
            for name, values in _ranking(hits, k).items():
                found.setdefault(name, []).append(values)
    return Scored(task.tested, {name: statistics.mean(np.concatenate(parts)) for name, parts in found.items()})


def _ranking(hits: NDArray[np.bool_], k: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Average precision, and hits among the first k, of rankings ``(m, candidates)``."""
    precision = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    scores = {"map": (precision * hits).sum(1) / np.maximum(hits.sum(1), 1)}
    for count in k:
        scores[f"top_{count}"] = hits[:, :count].any(1)
        scores[f"precision_{count}"] = hits[:, :count].mean(1)
    return scores


def cluster(features: Features, task: Task, repeats: int = 10) -> Scored:
    """k-means of the tested rows, with as many clusters as classes, compared with the classes.

    Features are scaled to length 1. ``ari`` is the adjusted Rand index (Hubert & Arabie 1985), in bootstrap samples
    over pairs of different rows; ``nmi`` the mutual information divided by the mean of both entropies.

    Args:
        features: ``(N, D)``.
        task: Labels and folds.
        repeats: Starts of k-means, of which the best is taken.
    """
    from sklearn.cluster import KMeans

    rows = task.tested
    model = KMeans(len(task.classes), n_init=repeats, random_state=task.seed)  # pyright: ignore[reportArgumentType]
    assigned = model.fit_predict(_unit(_array(features, rows)))
    truth = task.truth[rows]
    return Scored(rows, {"ari": adjusted_rand(truth, assigned), "nmi": mutual_information(truth, assigned)})


def adjusted_rand(truth: Rows, assigned: Rows) -> Statistic:
    """Adjusted Rand index of two partitions ``(M,)`` of weighted rows, over pairs of different rows."""
    members = [_members(one) for one in (truth, assigned)]

    def statistic(weights: Values) -> Values:
        squares = weights**2
        table = _table(weights, *members)  # (R, classes, clusters)
        itself = squares.sum(1)  # a row is no pair with itself, also if it was drawn twice
        together = ((table**2).sum((1, 2)) - itself) / 2
        rows, columns = (((table.sum(axis) ** 2).sum(1) - itself) / 2 for axis in (2, 1))
        total = (weights.sum(1) ** 2 - itself) / 2
        expected = statistics.divide(rows * columns, total)
        return statistics.divide(together - expected, (rows + columns) / 2 - expected)

    return statistic


def mutual_information(truth: Rows, assigned: Rows) -> Statistic:
    """Normalised mutual information of two partitions ``(M,)`` of weighted rows."""
    members = [_members(one) for one in (truth, assigned)]

    def statistic(weights: Values) -> Values:
        joint = _table(weights, *members) / weights.sum(1)[:, None, None]
        rows, columns = joint.sum(2), joint.sum(1)
        information = _entropy(rows) + _entropy(columns) - _entropy(joint.reshape(len(joint), -1))
        return statistics.divide(information, (_entropy(rows) + _entropy(columns)) / 2)

    return statistic


def _members(numbers: Rows) -> Values:
    return (np.unique(numbers)[:, None] == numbers).astype(np.float64)  # (groups, M)


def _table(weights: Values, rows: Values, columns: Values) -> Values:
    """Weighted contingency table ``(R, rows, columns)``."""
    return np.stack([(weights * member) @ columns.T for member in rows], 1)


def _entropy(shares: Values) -> Values:
    logarithms = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logarithms).sum(1)


# ----------------------------------------------------------------------------------------------- baseline


def classification(task: Task, probabilities: Values, prefix: str = "") -> dict[str, Statistic]:
    """Balanced accuracy, accuracy and AUC of the tested rows.

    Args:
        task: Labels and folds.
        probabilities: ``(M, C)`` of the tested rows.
        prefix: Before the names.
    """
    truth, predicted = task.truth[task.tested], probabilities.argmax(1)
    return {
        f"{prefix}balanced_accuracy": statistics.balanced_accuracy(truth, predicted),
        f"{prefix}accuracy": statistics.accuracy(truth, predicted),
        f"{prefix}auc": statistics.auc(truth, probabilities),
    }


def chance(task: Task, metrics: Sequence[str]) -> Mapping[str, float]:
    """Scores without any information on the rows: for accuracy, of always naming the most frequent training class.

    Args:
        task: Labels and folds.
        metrics: Names of the metrics of an evaluator; those without a known chance are left out.
    """
    right = [task.truth[fold.test] == np.bincount(task.truth[fold.train]).argmax() for fold in task.folds]
    shares = np.bincount(task.truth[task.tested], minlength=len(task.classes)) / len(task.tested)
    present = np.count_nonzero(shares)
    same = float((shares**2).sum())
    known = {"balanced_accuracy": 1 / present, "accuracy": float(np.concatenate(right).mean()), "auc": 0.5}
    exact = {"ari": 0.0, "nmi": 0.0, "map": same}
    found = {}
    for metric in metrics:
        suffix = next((name for name in known if metric.endswith(name)), None)
        if metric in exact:
            found[metric] = exact[metric]
        elif suffix:
            found[metric] = known[suffix]
        elif metric.startswith("precision_"):
            found[metric] = same
    return found


# ------------------------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class _Vectors:
    """Some rows of features, of which slices are float32 tensors on a device."""

    features: Features
    rows: Rows
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.features.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice, /) -> torch.Tensor:
        return torch.from_numpy(_array(self.features, self.rows[rows])).to(self.device)


def _blocks(rows: Rows) -> Iterator[Rows]:
    """The rows, at most :data:`ROWS_AT_ONCE` at a time."""
    yield from np.array_split(rows, max(1, math.ceil(len(rows) / ROWS_AT_ONCE)))


def _array(features: Features, rows: Rows) -> NDArray[np.float32]:
    """A float32 copy of some rows, made without another one of all of them."""
    found = np.empty((len(rows), features.shape[1]), np.float32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        found[start : start + ROWS_AT_ONCE] = features[rows[start : start + ROWS_AT_ONCE]]
    return found


def _unit_tensor(features: Features, rows: Rows) -> torch.Tensor:
    """A float32 copy of some rows, scaled to length 1."""
    found = torch.from_numpy(_array(features, rows))
    for part in found.split(ROWS_AT_ONCE):
        part.copy_(F.normalize(part, dim=1))
    return found


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
