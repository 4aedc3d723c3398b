"""Results of evaluations in the folders of runs, as tables of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from dino.errors import DataError
from dino.evaluate.results import Result
from dino.evaluate.scores import leakage_marks, marks, score_table
from dino.report.data import RunData
from dino.report.page import Section, Table


def scores_section(runs: Sequence[RunData]) -> tuple[Section | None, list[str]]:
    """A table of each result; None if there are none, and sentences on files that are none after all."""
    tables, damaged = [], []
    for run in runs:
        damaged += [f"{run.name}: {name} is damaged; evaluate again." for name in run.damaged]
        for name, result in run.scores.items():
            try:
                tables.append(scores_table(run, name, result))
            except (DataError, KeyError, IndexError, TypeError, ValueError, AttributeError):
                damaged.append(f"{run.name}: {name} is not a complete result of `dino evaluate`; evaluate again.")
    introduction = "Frozen features on labelled data, beside their baselines."
    return Section("Scores", introduction, tables) if tables else None, damaged


def scores_table(run: RunData, name: str, result: Mapping[str, Any]) -> Table:
    """The scores that ``dino evaluate`` wrote, with a mark if the test data chose the checkpoint or was trained on.

    Args:
        run: The run.
        name: Name of the file.
        result: Its content.
    """
    about = result.get("about", {})
    counts = f"{about.get('queries', '?')} test and {about.get('references', '?')} reference rows"
    step = f", checkpoint of step {about['step']:,}" if isinstance(about.get("step"), int) else ""
    if "evaluation" in result:
        whole = Result.from_dict(result, name)
        rows, header = whole.table()
        counts = f"{about.get('queries', about.get('cases', '?'))} scored rows of {whole.labels}"
        resampled = f", with 95 % intervals from {about.get('resamples', 0):,} bootstrap samples"
        units = f" of {about.get('resampled', '?')} {about.get('grouped_by', 'groups')}"
        warning = "".join(f" {line}." for line in marks(whole))
        return Table(header, rows, f"{run.name}, {name}: {counts}{step}{resampled}{units}.{warning}")
    rows, header = score_table(result)
    found = "; ".join(f"{text}: {count}" for text, count in leakage_marks(result))
    warning = f" These scores are optimistic: {found}." if found else ""
    return Table(header, rows, f"{run.name}, {name}: {counts} of {about.get('labels', '?')}{step}.{warning}")
