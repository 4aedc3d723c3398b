"""Results of an evaluation: a row per model and baseline, with intervals and differences to the first model."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dino import files
from dino.errors import DataError
from dino.evaluate.statistics import Scored, Values, bootstrap

LEVEL = 95.0  # percent, of the intervals
FORMAT = 1
MODEL, CHANCE = "model", "chance"  # roles of rows, beside those of baselines


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; None where it is undefined or not resampled."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def text(self, signed: bool = False) -> str:
        """``0.871 [0.842, 0.899]``."""
        sign = "+" if signed else ""
        if self.value is None:
            return "undefined"
        if self.low is None or self.high is None or self.low == self.high:
            return f"{self.value:{sign}.3f}"
        return f"{self.value:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


@dataclass(frozen=True)
class ResultRow:
    """Scores of one model or baseline.

    Attributes:
        name: Unique name in the table.
        role: ``model``, or the kind of baseline: ``initial_weights``, ``random_initialization``, ``pixels_8x8``, ...
        estimates: By metric.
        differences: To the first row, by metric, from the same bootstrap samples; empty for the first row.
        source: Where the model is.
        fingerprint: Of its weights.
        details: Further plain values of the evaluator.
    """

    name: str
    role: str
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    source: str = ""
    fingerprint: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """What :func:`collect` makes a row of; the statistics of all entries are of the same rows of the table."""

    name: str
    role: str
    scored: Scored
    source: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class Result:
    """An evaluation of several models on one table.

    Attributes:
        evaluation: ``knn``, ``linear``, ``slide``, ...
        labels: The table.
        primary: The metric that figures and comparisons show.
        rows: A row per model, then the baselines.
        about: Settings, counts and checks.
    """

    evaluation: str
    labels: str
    primary: str
    rows: Sequence[ResultRow]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of all rows, in their order."""
        return list(dict.fromkeys(metric for row in self.rows for metric in row.estimates))

    def table(self, metrics: Sequence[str] = ()) -> tuple[list[list[str]], list[str]]:
        """Rows and header of a table with a row per model.

        Args:
            metrics: The metrics to show; none given: all.
        """
        metrics = list(metrics) or self.metrics
        compared = any(row.differences.get(self.primary) for row in self.rows)
        header = ["model", *(metric.replace("_", " ") for metric in metrics)]
        if compared:
            header.append(f"{self.primary.replace('_', ' ')}, difference to the first")
        rows = []
        for row in self.rows:
            shown = [row.estimates[name].text() if name in row.estimates else "" for name in metrics]
            difference = row.differences.get(self.primary)
            rows.append([row.name, *shown, *([difference.text(signed=True) if difference else ""] if compared else [])])
        return rows, header

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "Result":
        """The inverse of :meth:`to_dict`.

        Args:
            values: What was read.
            where: Where it was read from, for the message.

        Raises:
            DataError: If it is no result of an evaluation.
        """
        try:
            rows = [
                ResultRow(
                    **{
                        **row,
                        **{
                            kind: {name: Estimate(**one) for name, one in row[kind].items()}
                            for kind in ("estimates", "differences")
                        },
                    }
                )
                for row in values["rows"]
            ]
            return cls(values["evaluation"], values["labels"], values["primary"], rows, values.get("about", {}))
        except (KeyError, TypeError, AttributeError):
            raise DataError(
                f"expected the JSON file of an evaluation (`dino evaluate ...`), found other content in {where}"
            ) from None

    def to_csv(self) -> str:
        """A line per model and metric."""
        ends = ("value", "low", "high")
        lines = [["evaluation", "model", "role", "metric", *ends, *(f"difference_{end}" for end in ends)]]
        for row in self.rows:
            for metric, found in row.estimates.items():
                pair = (found, row.differences.get(metric, Estimate(None)))
                numbers = [number for one in pair for number in (one.value, one.low, one.high)]
                words = ["" if number is None else f"{number:.6g}" for number in numbers]
                lines.append([self.evaluation, row.name, row.role, metric, *words])
        return files.csv_text(lines)


def collect(
    evaluation: str,
    labels: str,
    entries: Sequence[Entry],
    groups: Sequence[Hashable],
    resamples: int,
    seed: int,
    about: Mapping[str, Any],
) -> Result:
    """Resample the statistics of all entries alike, and form intervals and paired differences.

    Args:
        evaluation: Name of the evaluation.
        labels: The table.
        entries: Models first; the differences are to the first one.
        groups: Patient of each scored row.
        resamples: Number of bootstrap samples; 0 for no intervals.
        seed: Seed of the samples.
        about: Settings, counts and checks.
    """
    rows: list[ResultRow] = []
    first = None
    for entry in entries:
        found = bootstrap(entry.scored.statistics, groups, resamples, seed)
        differences = {}
        if first is not None:
            differences = {
                name: estimate(one.value - first[name].value, one.values - first[name].values)
                for name, one in found.items()
                if name in first
            }
        estimates = {name: estimate(one.value, one.values) for name, one in found.items()}
        rows.append(
            ResultRow(
                entry.name, entry.role, estimates, differences, entry.source, entry.fingerprint, entry.scored.details
            )
        )
        first = first or found
    primary = entries[0].scored.primary or next(iter(entries[0].scored.statistics))
    counts = {"resampled": len(set(groups)), "resamples": resamples, "resampling_seed": seed}
    return Result(evaluation, labels, primary, rows, {**about, **counts})


def estimate(value: float, values: Values) -> Estimate:
    """A value with the percentile interval of its bootstrap samples; undefined samples are left out."""
    known = values[np.isfinite(values)]
    if not math.isfinite(value):
        return Estimate(None)
    if not len(known):
        return Estimate(value)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(known, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def read_result(path: Path) -> Result:
    """Read a result.

    Raises:
        DataError: If the file is missing, or is no result of an evaluation.
    """
    try:
        values = files.read_json(path)
    except FileNotFoundError:
        raise DataError(f"expected the JSON file of an evaluation at {path}, found none") from None
    except (OSError, ValueError) as error:
        raise DataError(f"expected the JSON file of an evaluation at {path}, could not read it: {error}") from None
    return Result.from_dict(values, str(path))
