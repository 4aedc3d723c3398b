"""Results of evaluations as a figure with intervals, and as a table in Markdown or LaTeX."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dino.evaluate.results import Estimate, Result
from dino.report.style import MUTED, TEXT, TRAINED, UNTRAINED, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 200
ROW_INCHES, MARGIN_INCHES, WIDTH_INCHES = 0.3, 0.85, 9.0
NAME_LETTERS = 44
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
}


def forest_plot(results: Sequence[Result]) -> bytes:
    """The primary metric of each model and baseline, and its difference to the first model, with 95 % intervals.

    Args:
        results: A group of rows each.

    Returns:
        A PNG.
    """
    count = sum(len(result.rows) + 1 for result in results)
    height = MARGIN_INCHES + ROW_INCHES * count
    with figure(WIDTH_INCHES, height) as drawn:
        values, differences = drawn.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
        names: list[str] = []
        for result in results:
            for row in [None, *result.rows]:
                place = len(names)
                names.append(_heading(result) if row is None else _short(row.name))
                if row is not None:
                    colour = TRAINED if row.role == "model" else UNTRAINED
                    _draw(values, place, row.estimates.get(result.primary), colour)
                    _draw(differences, place, row.differences.get(result.primary), colour)
        values.set_yticks(range(len(names)), names)
        headings = {_heading(result) for result in results}
        for label in values.get_yticklabels():
            label.set_color(TEXT)
            label.set_fontweight("bold" if label.get_text() in headings else "normal")
        values.set_ylim(len(names) - 0.5, -0.5)
        values.set_xlabel("score")
        differences.set_xlabel("difference to the first model")
        differences.axvline(0, color=MUTED, linewidth=0.8)
        for axes in (values, differences):
            axes.grid(axis="y", visible=False)
        drawn.subplots_adjust(left=0.33, right=0.98, top=1 - 0.15 / height, bottom=0.5 / height)
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def markdown(results: Sequence[Result]) -> str:
    """The rows of all results as a table in Markdown."""
    lines = [["" if cell is None else cell.replace("|", "\\|") for cell in line] for line in _cells(results)]
    header, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([header, "|" + " --- |" * len(lines[0]), *rows]) + "\n"


def latex(results: Sequence[Result]) -> str:
    """The rows of all results as a table in LaTeX, for the package booktabs."""
    header, *rows = (" & ".join(_escape(cell) for cell in line) + r" \\" for line in _cells(results))
    lines = [rf"\begin{{tabular}}{{{'l' * len(_cells(results)[0])}}}", r"\toprule", header, r"\midrule"]
    return "\n".join([*lines, *rows, r"\bottomrule", r"\end{tabular}"]) + "\n"


def compared(results: Sequence[Result]) -> tuple[list[list[str]], list[str]]:
    """Rows and header of the table of all results, for a terminal."""
    header, *rows = _cells(results)
    return rows, header


def _cells(results: Sequence[Result]) -> list[list[str]]:
    lines = [["evaluation", "labels", "model", "metric", "score [95 % interval]", "difference to the first"]]
    for result in results:
        for row in result.rows:
            difference = row.differences.get(result.primary)
            lines.append(
                [
                    *(result.evaluation, result.labels, row.name, result.primary.replace("_", " ")),
                    row.estimates.get(result.primary, Estimate(None)).text(),
                    difference.text(signed=True) if difference else "",
                ]
            )
    return lines


def _heading(result: Result) -> str:
    return f"{result.evaluation}: {result.primary.replace('_', ' ')}"


def _short(name: str) -> str:
    return name if len(name) <= NAME_LETTERS else f"…{name[1 - NAME_LETTERS :]}"


def _draw(axes: "Axes", place: int, found: Estimate | None, colour: str) -> None:
    if found is None or found.value is None:
        return
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot([found.value], [place], "o", color=colour, markersize=5)


def _escape(cell: str) -> str:
    return "".join(LATEX.get(character, character) for character in cell)
