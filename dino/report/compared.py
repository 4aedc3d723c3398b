"""The section that compares runs of one level: their curves, results and settings."""

from collections.abc import Sequence
from typing import Any

from dino.evaluate.verdict import TEACHER
from dino.report import curves
from dino.report.curves import Series
from dino.report.data import RunData
from dino.report.page import Figure, Section, Table
from dino.train.evaluator import OWN_PLACE

# Settings that change nothing.
NOT_COMPARED = ("data_dir", "more_data_dirs", "output_dir", "logging.", "dry_run", "profile")


def comparison_sections(runs: Sequence[RunData]) -> list[Section]:
    """A section for each level with several runs."""
    levels = dict.fromkeys(run.level for run in runs)
    groups = {level: [run for run in runs if run.level == level] for level in levels}
    return [_section(level, group) for level, group in groups.items() if len(group) > 1]


def _section(level: str, runs: Sequence[RunData]) -> Section:
    different = differing_settings(runs)
    names = [run.name for run in runs]
    items: list[Figure | Table] = [
        Figure(
            curves.training_curves(series(runs)),
            f"Curves of {', '.join(names)} over one another: loss, teacher entropy, learning rate, and a fourth panel.",
            "Loss and entropy are relative to ln K, so that runs with different numbers of prototypes can be compared. "
            "A lower loss does not mean better features: compare scores.",
            narrow=curves.training_curves(series(runs), curves.NARROW),
        ),
        Table(["", *names], _results(runs), "Results of the runs.", text=True),
    ]
    if different:
        rows = [[key, *(_text(value) for value in values)] for key, values in different.items()]
        items.append(Table(["Setting", *names], rows, "Settings that differ.", text=True))
    same = "" if different else " All settings that matter for the result are equal."
    return Section(f"Comparison: {level} level", f"Runs of one level beside one another.{same}", items)


def series(runs: Sequence[RunData]) -> list[Series]:
    """The logs of runs, as curves take them."""
    return [Series(run.name, run.lines, run.is_pretrained) for run in runs]


def differing_settings(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Values of the settings in which runs differ, by key; None where a run has no such setting."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not key.startswith(NOT_COMPARED))
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _results(runs: Sequence[RunData]) -> list[list[str]]:
    rows = {
        "verdict": [(run.status.get("verdict") or {}).get("word", run.status.get("state", "")) for run in runs],
        "steps": [f"{run.status.get('step', 0):,}" for run in runs],
        "loss, relative to ln K": [_number(run.last.get("loss_relative")) for run in runs],
        "effective rank of the features": [
            _number((run.status.get("floor") or {}).get("effective_rank")) for run in runs
        ],
        "self-retrieval accuracy": [
            _number((run.status.get("floor") or {}).get(f"{OWN_PLACE}{TEACHER}")) for run in runs
        ],
        "best score on labels": [_number(best_score(run)) for run in runs],
    }
    return [[name, *values] for name, values in rows.items() if any(values)]


def best_score(run: RunData) -> float | None:
    """The best kNN accuracy of the teacher in the log; None if none was measured."""
    found = [
        value
        for line in run.lines
        for name, value in line.get("evaluation", {}).get(TEACHER, {}).items()
        if name.endswith("_accuracy") and "balanced" not in name
    ]
    return max(found, default=None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _text(value: Any) -> str:
    return "–" if value is None else str(value)
