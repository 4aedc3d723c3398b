"""What is predicted of a slide or patient: its class, a number, or its survival."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dino.evaluate import survival
from dino.evaluate.statistics import Statistic, Values, accuracy, auc, balanced_accuracy, mean, mean_of_parts
from dino.evaluate.task import Rows, groups_per_class
from dino.evaluate.tiles import fit_linear

QUANTILES = 4  # strata of a number in a cross-validation
INTERVALS = 4  # of time, for hazards
SMALLEST = 1e-12  # probability in a logarithm


@dataclass(frozen=True)
class Head:
    """How a network predicts an outcome.

    Attributes:
        outputs: Number of its outputs K.
        loss: Of outputs ``(K,)`` and the index of their row.
        predict: Predictions of outputs ``(n, K)``.
    """

    outputs: int
    loss: Callable[[Tensor, int], Tensor]
    predict: Callable[[Tensor], Values]


class Outcome(ABC):
    """The outcome of M cases. Predictions are ``(n, P)``: probabilities of P classes, or one number."""

    name: str
    penalties: Sequence[float]  # of the linear model, from the strongest

    @abstractmethod
    def strata(self) -> list[str]:
        """``(M,)`` what the folds of a cross-validation are stratified by."""

    @property
    def needed(self) -> set[str]:
        """The strata without which no model can be fitted or scored."""
        return set()

    def strata_of(self, rows: Sequence[int], groups: Sequence[str], folds: int) -> list[str]:
        """Strata of rows for a number of folds: one for all, where others than the needed ones have too few groups.

        Args:
            rows: ``(n,)``.
            groups: ``(n,)`` patient of each of them.
            folds: Number of folds.
        """
        every = self.strata()
        strata = [every[row] for row in rows]
        small = {name for name, count in groups_per_class(strata, groups).items() if count < folds}
        return ["all"] * len(strata) if small and not small & self.needed else strata

    def check_packages(self) -> None:  # noqa: B027 (most need none)
        """Raise ConfigError if a package that :meth:`fit` needs is not installed."""

    @abstractmethod
    def lacking(self, rows: Rows) -> str:
        """What training rows lack, in words; empty if a model can be fitted to them."""

    @abstractmethod
    def fit(self, vectors: Values, rows: Rows, penalty: float) -> Callable[[Rows], Values]:
        """A linear model of standardised vectors.

        Args:
            vectors: ``(M, D)`` float64.
            rows: Rows that it is fitted to.
            penalty: One of :attr:`penalties`.

        Returns:
            Predictions of rows.
        """

    @abstractmethod
    def head(self, rows: Rows) -> Head:
        """The head of a network that is trained on ``rows``."""

    @abstractmethod
    def constant(self, rows: Rows) -> Values:
        """``(P,)`` the prediction of a model without features that is fitted to ``rows``."""

    @abstractmethod
    def error(self, predicted: Values, rows: Rows) -> float:
        """Error of predictions of validation rows, by which models are chosen; NaN where it is undefined."""

    @abstractmethod
    def statistics(self, predicted: Values, rows: Rows, parts: Sequence[Rows]) -> dict[str, Statistic]:
        """Scores of predictions of ``rows``.

        Scores that compare rows with each other are means over ``parts``, because predictions of models that were
        fitted to different folds are not on one scale.

        Args:
            predicted: ``(n, P)``.
            rows: ``(n,)``.
            parts: Positions in ``rows`` that one model predicted each.
        """


class Classes(Outcome):
    """A class.

    Args:
        labels: ``(M,)`` class names.
    """

    name = "classification"
    penalties = tuple(
        float(value) for value in np.logspace(4, -2, 7)
    )  # of half the squared weights; scikit-learn's 1/C

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels, self.classes = list(labels), sorted(set(labels))
        self.truth = np.searchsorted(np.array(self.classes), np.array(self.labels))

    def strata(self) -> list[str]:
        """See :class:`Outcome`."""
        return self.labels

    @property
    def needed(self) -> set[str]:
        """All classes."""
        return set(self.classes)

    def lacking(self, rows: Rows) -> str:
        """See :class:`Outcome`."""
        return "" if len(set(self.truth[rows])) > 1 else "a second class"

    def fit(self, vectors: Values, rows: Rows, penalty: float) -> Callable[[Rows], Values]:
        """Multinomial logistic regression."""
        return fit_linear(vectors, self.truth, rows, 1 / penalty, len(self.classes))

    def head(self, rows: Rows) -> Head:
        """Logits and cross-entropy."""

        def loss(logits: Tensor, row: int) -> Tensor:
            return F.cross_entropy(logits, torch.tensor(self.truth[row], device=logits.device))

        return Head(len(self.classes), loss, lambda logits: logits.double().softmax(1).numpy())

    def constant(self, rows: Rows) -> Values:
        """The frequencies of the classes."""
        return np.bincount(self.truth[rows], minlength=len(self.classes)) / len(rows)

    def error(self, predicted: Values, rows: Rows) -> float:
        """Mean negative logarithm of the probability of the true class."""
        return -float(np.log(predicted[np.arange(len(rows)), self.truth[rows]].clip(SMALLEST)).mean())

    def statistics(self, predicted: Values, rows: Rows, parts: Sequence[Rows]) -> dict[str, Statistic]:
        """Area under the ROC curve within parts, balanced accuracy and accuracy."""
        truth, chosen = self.truth[rows], predicted.argmax(1)
        return {
            "auc": mean_of_parts(parts, lambda part: auc(truth[part], predicted[part])),
            "balanced_accuracy": balanced_accuracy(truth, chosen),
            "accuracy": accuracy(truth, chosen),
        }


class Numbers(Outcome):
    """A number.

    Args:
        values: ``(M,)``.
    """

    name = "regression"
    penalties = tuple(10.0**power for power in range(6, -1, -1))  # of the squared weights; scikit-learn's alpha

    def __init__(self, values: Sequence[float]) -> None:
        self.truth = np.asarray(values, np.float64)

    def strata(self) -> list[str]:
        """Quarters of the cases, ordered by their number."""
        place = np.argsort(np.argsort(self.truth, kind="stable"))
        return [f"quarter {1 + i * QUANTILES // len(place)}" for i in place]

    def lacking(self, rows: Rows) -> str:
        """See :class:`Outcome`."""
        return "" if len(set(self.truth[rows])) > 1 else "a second value"

    def fit(self, vectors: Values, rows: Rows, penalty: float) -> Callable[[Rows], Values]:
        """Ridge regression."""
        from sklearn.linear_model import Ridge

        standardised = _standardised(vectors, rows)
        model = Ridge(penalty).fit(standardised(rows), self.truth[rows])
        return lambda others: model.predict(standardised(others))[:, None]

    def head(self, rows: Rows) -> Head:
        """The standardised number, and its squared error."""
        centre, scale = self.truth[rows].mean(), self.truth[rows].std()

        def loss(output: Tensor, row: int) -> Tensor:
            return (output[0] - (self.truth[row] - centre) / scale).square()

        return Head(1, loss, lambda outputs: outputs.double().numpy() * scale + centre)

    def constant(self, rows: Rows) -> Values:
        """The mean."""
        return self.truth[rows].mean(keepdims=True)

    def error(self, predicted: Values, rows: Rows) -> float:
        """Mean squared error."""
        return float(np.square(predicted[:, 0] - self.truth[rows]).mean())

    def statistics(self, predicted: Values, rows: Rows, parts: Sequence[Rows]) -> dict[str, Statistic]:
        """Share of the variance that is explained, Pearson correlation within parts, and mean absolute error."""
        truth, numbers = self.truth[rows], predicted[:, 0]
        return {
            "r2": _explained(truth, numbers),
            "pearson": mean_of_parts(parts, lambda part: _correlation(truth[part], numbers[part])),
            "mae": mean(np.abs(truth - numbers)),
        }


class Survival(Outcome):
    """Time to an event or to censoring.

    Args:
        times: ``(M,)`` positive.
        events: ``(M,)`` whether the event was observed.
    """

    name = "survival"
    penalties = (10.0, 1.0, 0.1, 0.01)  # lifelines' penalizer

    def __init__(self, times: Sequence[float], events: Sequence[bool]) -> None:
        self.times, self.events = np.asarray(times, np.float64), np.asarray(events, np.bool_)

    def strata(self) -> list[str]:
        """See :class:`Outcome`."""
        return ["event" if event else "censored" for event in self.events]

    @property
    def needed(self) -> set[str]:
        """Observed events."""
        return {"event"}

    def lacking(self, rows: Rows) -> str:
        """See :class:`Outcome`."""
        return "" if self.events[rows].any() else "an event that is not censored"

    def check_packages(self) -> None:
        """See :class:`Outcome`."""
        survival.import_lifelines()

    def fit(self, vectors: Values, rows: Rows, penalty: float) -> Callable[[Rows], Values]:
        """A Cox model of principal components."""
        standardised = _standardised(vectors, rows)
        risk = survival.fit_cox(standardised(rows), self.times[rows], self.events[rows], penalty)
        return lambda others: risk(standardised(others))[:, None]

    def head(self, rows: Rows) -> Head:
        """Hazards in discrete time.

        Their likelihood is a sum over cases, so that a step needs the bags of a few of them, where Cox's partial
        likelihood needs those of all cases at risk.
        """
        ends = survival.interval_ends(self.times[rows], self.events[rows], INTERVALS)

        def loss(logits: Tensor, row: int) -> Tensor:
            return survival.hazard_loss(logits, self.times[row], bool(self.events[row]), ends)

        return Head(len(ends) + 1, loss, lambda logits: survival.hazard_risk(logits)[:, None].numpy())

    def constant(self, rows: Rows) -> Values:
        """The same risk for all."""
        return np.zeros(1)

    def error(self, predicted: Values, rows: Rows) -> float:
        """One minus the C-index."""
        index = survival.concordance(self.times[rows], self.events[rows], predicted[:, 0])
        return 1 - float(index(np.ones((1, len(rows))))[0])

    def statistics(self, predicted: Values, rows: Rows, parts: Sequence[Rows]) -> dict[str, Statistic]:
        """The C-index within parts."""
        times, events, risk = self.times[rows], self.events[rows], predicted[:, 0]
        return {
            "c_index": mean_of_parts(parts, lambda part: survival.concordance(times[part], events[part], risk[part]))
        }


def _standardised(vectors: Values, rows: Rows) -> Callable[[Rows], Values]:
    """Vectors of any rows, standardised by those of ``rows``."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors[rows])
    return lambda others: np.asarray(scaler.transform(vectors[others]))


def _explained(truth: Values, predicted: Values) -> Statistic:
    squared, centred = np.square(truth - predicted), truth - truth.mean()
    smallest = 1e-12 * np.square(centred).mean()  # of rounding, in a sample of equal numbers

    def statistic(weights: Values) -> Values:
        total = weights.sum(1)
        variance = weights @ np.square(centred) / total - (weights @ centred / total) ** 2
        return 1 - weights @ squared / total / np.where(variance > smallest, variance, np.nan)

    return statistic


def _correlation(truth: Values, predicted: Values) -> Statistic:
    if min(np.ptp(truth), np.ptp(predicted)) == 0:
        return lambda weights: np.full(len(weights), np.nan)
    a, b = (truth - truth.mean()) / truth.std(), (predicted - predicted.mean()) / predicted.std()

    def statistic(weights: Values) -> Values:
        total = weights.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):  # samples without rows of this part
            mean_a, mean_b = weights @ a / total, weights @ b / total
            covariance = weights @ (a * b) / total - mean_a * mean_b
            variances = (weights @ a**2 / total - mean_a**2) * (weights @ b**2 / total - mean_b**2)
            return covariance / np.sqrt(np.where(variances > 1e-12, variances, np.nan))

    return statistic
