"""Robustness of features: whether they follow the biology, or a confounder such as centre, scanner or stain.

A neighbour of a row has the same or another label, and the same or another confounder. One with the same label and
another confounder (SO) shows that the features follow the biology; one with another label and the same confounder (OS)
shows that they follow the confounder; the other two kinds (SS, OO) show neither. Rows of one patient are never
neighbours.

- RI, the robustness index: ``SO / (SO + OS)``, counted over the k nearest neighbours of all rows (de Jong et al. 2025,
  arXiv 2501.18055; Kömen et al. 2025, arXiv 2507.17845).
- MaRI: the same, each neighbour weighted by ``exp(-d / tau)``, d its cosine distance and tau the median of these
  distances (Grisi et al. 2026, arXiv 2607.25497).
- CRoMa: the median over rows of ``(d_OS - d_SO) / (d_OS + d_SO)``, each d the mean distance to the m nearest neighbours
  of that kind; and the mean of its lowest tenth (same paper).
- APD, the average performance drop: the relative change of the balanced accuracy of a linear classifier of the labels
  when label and confounder are associated in its training data (Kömen et al. 2025); see :mod:`.performance_drop`.

The package ``croma`` computes them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino.config.evaluators import RobustnessConfig
from dino.errors import DataError
from dino.evaluate.confounders import (
    KINDS,
    OS,
    SO,
    Design,
    Numbers,
    check_neighbours,
    design,
    import_croma,
    without_warnings,
)
from dino.evaluate.performance_drop import performance_drop
from dino.evaluate.statistics import Scored, Statistic, Values, divide
from dino.evaluate.task import Fold, Rows, Task, grouped_folds, groups_per_class
from dino.evaluate.tiles import linear

TAIL = 0.1  # fraction of the rows, those of the lowest margin, that the tail of CRoMa is the mean of
NEUTRAL = {"ri": 0.5, "mari": 0.5, "croma": 0.0}  # where no neighbour shows what the features follow, as croma has it
DISTANCES_AT_ONCE = 1 << 23  # 64 MB


def robustness(
    features: NDArray[Any], found: Design, rows: Rows, folds: Sequence[Fold], config: RobustnessConfig
) -> Scored:
    """RI, MaRI, CRoMa and its tail, APD, and how well linear probes predict the label and the confounder.

    A statistic of rows has the interval of a bootstrap over patients; APD is a single number, of which the details have
    the standard deviation over its repetitions.

    Args:
        features: ``(M, D)`` features of the rows.
        found: Labels, confounders and patients of the rows.
        rows: ``(M,)`` their indices in the table.
        folds: Of the rows, for both probes, see :func:`probe_folds`.
        config: Settings.

    Raises:
        ConfigError: If ``croma`` is not installed.
        DataError: If the features are not finite.
    """
    scores, details = neighbour_measures(features, found, config.k, config.m)
    if config.apd:
        drop = performance_drop(features, found, config.apd, config.seed)
        scores["apd"] = of_the_data(np.nan if drop.value is None else drop.value)
        details |= drop.to_dict()
    groups = list(map(str, found.groups))
    for name, truth, classes in (("label", found.labels, found.classes), (found.by, found.confounders, found.values)):
        task = Task(truth, classes, groups, folds, config.seed)
        probe = linear(features, task, config.strengths)
        scores[f"{name}_probe"] = _reordered(probe.statistics["balanced_accuracy"], task.tested)
        details[f"{name}_probe_strengths"] = probe.details["strengths"]
    return Scored(rows, scores, details)


def probe_folds(found: Design, folds: int, seed: int) -> list[Fold]:
    """Folds of the rows, grouped by patient, and stratified by label and confounder as far as patients suffice.

    Args:
        found: The rows.
        folds: Number of folds; fewer where a label or a value of the confounder has fewer patients.
        seed: Seed.

    Raises:
        DataError: If a value of the confounder, or a class, is of one patient.
    """
    groups, by_cell = list(map(str, found.groups)), list(map(str, found.cells))
    by_value = [str(found.values[value]) for value in found.confounders]
    for strata in (by_cell, by_value):
        number = min(folds, *groups_per_class(strata, groups).values())
        if number > 1:
            return grouped_folds(strata, groups, number, seed)
    single = min(name for name, count in groups_per_class(by_value, groups).items() if count == 1)
    raise DataError(
        f"expected at least two patients of every {found.by}, found one of '{single}', where patient and {found.by} "
        "cannot be told apart: remove its rows, or add patients"
    )


def neighbour_measures(
    features: NDArray[Any], found: Design, k: Sequence[int], m: int
) -> tuple[dict[str, Statistic], dict[str, Any]]:
    """RI, MaRI and CRoMa.

    Neighbours are those among all rows; a bootstrap sample weights the rows whose neighbours are counted. NaN where a
    measure is undefined, as CRoMa is where features are equal.

    Args:
        features: ``(N, D)`` features.
        found: The rows, see :func:`check_neighbours`.
        k: Candidates of the number of neighbours of RI and MaRI; that of the highest balanced accuracy of kNN
            classification of the labels is used, as in the paper.
        m: Number of neighbours of each kind of CRoMa.

    Returns:
        ``ri``, ``mari``, ``croma`` and ``croma_tail`` as statistics of all rows, and details: the used ``k`` and
        ``tau``, ``support`` (the fraction of rows with a neighbour of kind SO or OS), ``neighbours`` (the fraction of
        each kind among the k nearest).

    Raises:
        ConfigError: If ``croma`` is not installed.
        DataError: If the features are not finite.
    """
    croma = import_croma()
    unit = unit_rows(features, len(found.labels))
    manifest = _manifest(found)
    with without_warnings():
        ri = croma.RI.compute(unit, manifest, confounder_column=found.by, k_candidates=list(k))
        mari = croma.MaRI.compute(unit, manifest, confounder_column=found.by, k_candidates=[ri.k])
        margins, undefined = _margins(croma, unit, manifest, found.by, m)
    kinds, distances = nearest(unit, found, ri.k)
    typed = (kinds == SO) | (kinds == OS)
    statistics = {
        "ri": _pooled(ri.sample_values_aligned, typed.sum(1)),
        "mari": _pooled(mari.sample_values_aligned, np.where(typed, np.exp(-distances / mari.tau), 0).sum(1)),
        "croma": median(margins),
        "croma_tail": lower_mean(margins, TAIL),
    }
    details: dict[str, Any] = {
        "k": int(ri.k),
        "tau": float(mari.tau),
        "m": m,
        "support": float(ri.support),
        "neighbours": {name: float((kinds == kind).mean()) for kind, name in enumerate(KINDS)},
        "confounder_dominant": float((margins <= 0).mean()),  # F(0) of the paper
    }
    return statistics, {**details, "croma_undefined": undefined} if undefined else details


def neighbour_scores(
    by: str, labels: Sequence[str], confounders: Sequence[str], groups: Sequence[str], k: int
) -> Callable[[NDArray[Any]], dict[str, float]]:
    """What scores features of some rows by RI, MaRI and CRoMa, again and again during training.

    Args:
        by: Name of the confounder.
        labels: See :func:`dino.evaluate.confounders.design`.
        confounders: See there.
        groups: See there.
        k: Number of neighbours; fewer where a row has fewer, as for CRoMa, which averages five.

    Returns:
        A function of ``(N, D)`` features to ``ri``, ``mari`` and ``croma``, neutral (:data:`NEUTRAL`) where undefined.

    Raises:
        ConfigError: If ``croma`` is not installed, or k is not positive.
        DataError: See :func:`dino.evaluate.confounders.design`; if a row has no neighbour of a kind.
    """
    import_croma()
    found = design(by, labels, confounders, groups)
    candidates = found.candidates()
    k = min(k, int(candidates.sum(1).min()))
    m = max(1, min(RobustnessConfig().m, int(candidates[:, [SO, OS]].min())))
    check_neighbours(found, [k], m)

    def score(features: NDArray[Any]) -> dict[str, float]:
        measured, _ = neighbour_measures(features, found, [k], m)
        values = {name: float(measured[name](np.ones((1, len(features))))[0]) for name in NEUTRAL}
        return {name: NEUTRAL[name] if np.isnan(value) else value for name, value in values.items()}

    return score


def chance(found: Design, rows: Rows, measures: Sequence[str]) -> Scored:
    """The measures of features that know neither label nor confounder, whose neighbours are drawn at random.

    Args:
        found: The rows.
        rows: ``(M,)`` their indices in the table.
        measures: Names of the measures; those without a known chance are left out.
    """
    candidates = found.candidates()
    share = candidates / candidates.sum(1, keepdims=True)
    typed = share[:, SO] + share[:, OS]
    ri = _pooled(divide(share[:, SO], typed), typed)
    exact = {
        "croma": 0.0,
        "apd": 0.0,
        "label_probe": 1 / len(found.classes),
        f"{found.by}_probe": 1 / len(found.values),
    }
    known = {"ri": ri, "mari": ri, **{name: of_the_data(value) for name, value in exact.items()}}
    neighbours = dict(zip(KINDS, share.mean(0).tolist(), strict=True))
    return Scored(rows, {name: known[name] for name in measures if name in known}, {"neighbours": neighbours})


def nearest(unit: Values, found: Design, k: int) -> tuple[Numbers, Values]:
    """Kinds and cosine distances ``(N, k)`` of the nearest neighbours of other patients, in no particular order.

    Args:
        unit: ``(N, D)`` features of unit length.
        found: The rows; each has at least k of other patients.
        k: Number of neighbours.
    """
    kinds, distances = [], []
    size = max(1, DISTANCES_AT_ONCE // len(unit))
    for start in range(0, len(unit), size):
        rows = np.arange(start, min(start + size, len(unit)))
        distance = np.clip(1 - unit[rows] @ unit.T, 0, None)  # (n, N)
        distance[found.groups[rows, None] == found.groups] = np.inf
        index = np.argpartition(distance, k - 1, axis=1)[:, :k]
        kinds.append(found.kinds(rows[:, None], index))
        distances.append(np.take_along_axis(distance, index, 1))
    return np.concatenate(kinds), np.concatenate(distances)


def unit_rows(features: NDArray[Any], count: int) -> Values:
    """Features of unit length, in float64.

    Args:
        features: ``(N, D)``.
        count: The expected N.

    Raises:
        DataError: If the features are not a matrix of that many rows, or hold non-finite values.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) != count:
        raise DataError(f"robustness: expected features ({count}, D), found {features.shape}")
    if not np.isfinite(features).all():
        rows = int((~np.isfinite(features)).any(1).sum())
        raise DataError(
            f"robustness: expected finite features, found NaN or infinity in {rows} of {count} rows; the model has "
            "diverged, or an image is damaged"
        )
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-12)  # as croma does


def median(values: Values) -> Statistic:
    """The median of ``values`` (M,), each counted as often as its weight says."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]

    def statistic(weights: Values) -> Values:
        counts = weights[:, order].cumsum(1)  # (R, M)
        total = counts[:, -1]
        return (_at_rank(ordered, counts, (total - 1) // 2) + _at_rank(ordered, counts, total // 2)) / 2

    return statistic


def lower_mean(values: Values, fraction: float) -> Statistic:
    """Mean of the ``values`` (M,) up to their quantile ``fraction``, interpolated as :func:`numpy.percentile` does."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]

    def statistic(weights: Values) -> Values:
        weights = weights[:, order]
        counts = weights.cumsum(1)  # (R, M)
        place = fraction * (counts[:, -1] - 1)
        low = _at_rank(ordered, counts, np.floor(place))
        quantile = low + (_at_rank(ordered, counts, np.ceil(place)) - low) * (place % 1)
        below = weights * (ordered <= quantile[:, None])
        return divide(below @ ordered, below.sum(1))

    return statistic


def of_the_data(value: float) -> Statistic:
    """A value that is known for weights of one alone, so that it has no interval."""
    return lambda weights: np.where((weights == 1).all(1), value, np.nan)


def _reordered(statistic: Statistic, order: Rows) -> Statistic:
    """A statistic of rows in another order, as a statistic of the rows."""
    return lambda weights: statistic(weights[:, order])


def _at_rank(ordered: Values, counts: Values, rank: Values) -> Values:
    """The value of a rank, from 0, in each sample; ``counts`` (R, M) are cumulative numbers of the ordered values."""
    return ordered[(counts <= rank[:, None]).sum(1)]


def _pooled(ratios: Values, evidence: Values) -> Statistic:
    """Mean of the rows' ratios (M,), weighted by their evidence (M,): the ratio of the sums over all rows."""
    evidence = np.asarray(evidence, np.float64)
    weighted = np.where(evidence > 0, ratios, 0) * evidence

    def statistic(weights: Values) -> Values:
        return divide(weights @ weighted, weights @ evidence)

    return statistic


def _margins(croma: Any, unit: Values, manifest: Any, by: str, m: int) -> tuple[Values, str]:
    """CRoMa's margin of every row; NaN, and the reason, where it is undefined."""
    try:
        found = croma.CRoMa.compute(unit, manifest, confounder_column=by, m=m, alpha=TAIL)
    except RuntimeError as error:  # features are equal: every row has enough neighbours, see check_neighbours
        return np.full(len(unit), np.nan), str(error)
    return found.sample_values_aligned, ""


def _manifest(found: Design) -> Any:
    """The table that croma reads labels, confounders and patients from."""
    import pandas as pd

    names = [str(row) for row in range(len(found.labels))]
    columns: Mapping[str, Any] = {
        "sample_id": names,
        "image_path": names,
        "label": found.labels,
        "group_id": found.groups,
        found.by: found.confounders,
    }
    return pd.DataFrame(columns)
