"""Survival: concordance of risks, Cox models of feature vectors, and hazards in discrete time."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dino.environment import import_extra
from dino.evaluate.statistics import Statistic, Values

COMPONENTS = 16  # at most, of the features that a Cox model is fitted to
EVENTS_PER_COMPONENT = 5
ROWS_AT_ONCE = 1024  # of the matrix of pairs


def concordance(times: Values, events: NDArray[np.bool_], risk: Values) -> Statistic:
    """Harrell's C-index: the share of comparable pairs in which the case with the earlier event has the higher risk.

    A pair is comparable if the earlier time is that of an event. At equal times it is comparable if one of the two is
    censored, who lived longer. Equal risks count half. These are the rules of ``lifelines.utils.concordance_index``.

    Args:
        times: ``(M,)`` time to event or censoring.
        events: ``(M,)`` whether the event was observed.
        risk: ``(M,)`` predicted risk, higher for earlier events.
    """
    later = np.where(events, times, np.nextafter(times, np.inf))  # a censored case outlives the events of its time
    first_rows = np.flatnonzero(events)

    def statistic(weights: Values) -> Values:
        concordant, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for start in range(0, len(first_rows), ROWS_AT_ONCE):
            rows = first_rows[start : start + ROWS_AT_ONCE]
            comparable = (times[rows, None] < later).astype(np.float64)  # (rows, M)
            difference = risk[rows, None] - risk
            won = comparable * (0.5 + 0.5 * np.sign(difference))
            pairs += ((weights @ comparable.T) * weights[:, rows]).sum(1)
            concordant += ((weights @ won.T) * weights[:, rows]).sum(1)
        return np.divide(concordant, pairs, out=np.full_like(pairs, np.nan), where=pairs > 0)

    return statistic


def fit_cox(features: Values, times: Values, events: NDArray[np.bool_], penalizer: float) -> Callable[[Values], Values]:
    """Cox's proportional hazards with an L2 penalty, fitted by lifelines to principal components.

    The components are those of the features that are given: at most :data:`COMPONENTS`, and one for every
    :data:`EVENTS_PER_COMPONENT` events.

    Args:
        features: ``(n, D)`` standardised.
        times: ``(n,)`` time to event or censoring.
        events: ``(n,)`` whether the event was observed; at least one.
        penalizer: Strength of the penalty, in lifelines' units.

    Returns:
        A function of features ``(m, D)`` that gives the logarithm of the relative hazard ``(m,)``; 0 where lifelines
        finds no optimum.

    Raises:
        ConfigError: If lifelines is not installed.
    """
    lifelines = import_lifelines()
    import pandas as pd

    centre = features.mean(0)
    _, scale, directions = np.linalg.svd(features - centre, full_matrices=False)
    count = int(min(COMPONENTS, max(1, events.sum() // EVENTS_PER_COMPONENT), (scale > 1e-9 * scale[0]).sum()))
    if count == 0:  # all features are equal
        return lambda others: np.zeros(len(others))
    basis = directions[:count].T * (np.sqrt(len(features)) / scale[:count])  # components of variance 1
    table = pd.DataFrame((features - centre) @ basis).assign(time=times, event=events)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slow convergence without a penalty; the result is compared by its score
        try:
            fitted = lifelines.CoxPHFitter(penalizer=penalizer).fit(table, "time", "event")
        except lifelines.exceptions.ConvergenceError:
            return lambda others: np.zeros(len(others))
    weights = basis @ fitted.params_.to_numpy()
    return lambda others: (others - centre) @ weights


def import_lifelines() -> Any:
    """The package lifelines.

    Raises:
        ConfigError: If it is not installed.
    """
    return import_extra("lifelines", "Cox models", "evaluate")


def interval_ends(times: Values, events: NDArray[np.bool_], count: int) -> Values:
    """Ends of all but the last of up to ``count`` intervals of time with equally many events each, ``(T - 1,)``."""
    ends = np.quantile(times[events], np.linspace(0, 1, count + 1)[1:-1])
    return np.unique(ends)


def hazard_loss(logits: Tensor, time: float, event: bool, ends: Values) -> Tensor:
    """Negative log-likelihood of one case under hazards in discrete time.

    With hazard h_j = sigmoid(logit_j) of interval j, a case with an event in interval k contributes log h_k + sum over
    j < k of log(1 - h_j), one censored in it the sum alone: it is known to have lived through the intervals before
    (Gensheimer & Narasimhan 2019, "A scalable discrete-time survival model for neural networks", eq. 1).

    Args:
        logits: ``(T,)``.
        time: Time to event or censoring.
        event: Whether the event was observed.
        ends: ``(T - 1,)`` ends of the intervals; a time equal to an end belongs to the interval before it.
    """
    interval = int(np.searchsorted(ends, time))
    target = torch.zeros_like(logits[: interval + event])
    target[interval:] = 1  # only there if the event was observed
    return F.binary_cross_entropy_with_logits(logits[: interval + event], target, reduction="sum")


def hazard_risk(logits: Tensor) -> Tensor:
    """Risk of cases with hazards in discrete time: minus the sum over intervals of the probability to survive them.

    Args:
        logits: ``(n, T)``.

    Returns:
        ``(n,)``, higher for earlier events.
    """
    return -torch.sigmoid(-logits.double()).cumprod(1).sum(1)
