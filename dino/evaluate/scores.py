"""Scores of ``dino evaluate`` as a table for the terminal and the report, also those that version 0.1.0 wrote."""

from collections.abc import Mapping
from typing import Any

from dino.evaluate.results import Result
from dino.evaluate.verdict import baselines_of, in_words

NOT_COLUMNS = {"standard_error", "standard_errors", "about"}


def score_table(result: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows and header of the scores: a column per network or baseline, a row per metric and standard error.

    A last row marks scores over test data that was pretrained on, or that chose the checkpoint.

    Args:
        result: What :func:`dino.api.evaluate_knn` returned, or wrote as JSON.
    """
    names = [name for name, found in result.items() if name not in NOT_COLUMNS and isinstance(found, Mapping)]
    errors = result.get("standard_errors", {})
    rows = []
    for metric in result[names[0]]:
        rows.append([metric, *(_text(result[name].get(metric)) for name in names)])
        if metric in errors.get(names[0], {}):
            k = metric.removeprefix("knn_").removesuffix("_accuracy")
            rows.append([f"{k}-NN accuracy, standard error", *(_text(errors[name].get(metric)) for name in names)])
    # A random network, which version 0.1.0 called untrained, also where the run started from model.init.
    shown = [in_words(next(iter(baselines_of({name: None}, pretrained=False)), name)) for name in names]
    marks = [[f"optimistic: {text}", count, *[""] * (len(names) - 1)] for text, count in leakage_marks(result)]
    return rows + marks, ["", *shown]


def leakage_marks(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Why scores are optimistic, and how many rows, slides or patients make them so; empty where nothing does."""
    about = result.get("about", {})
    selection, pretraining = about.get("selection", {}), about.get("leakage", {})
    counts = {
        "test slides that were pretrained on": len(pretraining.get("seen_slides", [])),
        "test patients that were pretrained on": len(pretraining.get("seen_patients", [])),
        "test files that were pretrained on": len(pretraining.get("seen_files", [])),
    }
    rows = selection.get("seen_rows", 0)
    chose = [("test rows that chose the checkpoint", f"{rows} of {about.get('queries', rows)}")] if rows else []
    return [*chose, *((text, str(count)) for text, count in counts.items() if count)]


def marks(result: Result) -> list[str]:
    """A line per model whose scores are optimistic, see :func:`leakage_marks`."""
    return [
        f"{row.name}: optimistic, {count} {text}"
        for row in result.rows
        for text, count in leakage_marks({"about": {**row.details, "queries": result.about.get("queries")}})
    ]


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
