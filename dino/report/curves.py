"""Curves of runs over their steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.evaluate.verdict import STUDENT, TEACHER, baselines_of, in_words
from dino.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]

WIDE, NARROW = 4, 1  # columns of panels on a page, and on a telephone
PANEL_INCHES = {WIDE: (2.75, 2.75), NARROW: (3.6, 2.4)}
POINTS = 400  # at most in a curve; more are averaged
RESOURCES = {  # logged numbers: title of their panel, and whether they are fractions
    "data_wait": ("Time waiting for data", True),
    "samples_per_second": ("Samples per second", False),
    "gpu_use": ("GPU in use", True),
    "gpu_watts": ("Power of the GPU, W", False),
}


@dataclass(frozen=True)
class Series:
    """What one run logged.

    Attributes:
        name: The run.
        lines: Lines of its ``metrics.jsonl``.
        pretrained: Whether it started from ``model.init``.
    """

    name: str
    lines: Lines
    pretrained: bool = False


def training_curves(runs: Sequence[Series], columns: int = WIDE) -> bytes:
    """Loss, teacher entropy, learning rate, and kNN scores (without scores: the gradient norm) over the steps.

    Args:
        runs: Runs, one curve each; with a single one the baselines of its scores are shown too.
        columns: Panels side by side: :data:`WIDE` or :data:`NARROW`.

    Returns:
        SVG; a panel without values shows "not recorded".
    """

    def draw(panels: Sequence["Axes"]) -> None:
        relative = any("loss_relative" in line for run in runs for line in run.lines)
        if relative:
            _panel(panels[0], runs, "loss_relative", "Loss, relative to ln K", limit=1.0, limit_label="uniform guess")
        else:
            _panel(panels[0], runs, "loss", "Loss")
        entropy = "teacher_entropy_relative"
        _panel(panels[1], runs, entropy, "Teacher entropy, relative to ln K", limit=1.0, limit_label="uniform")
        _panel(panels[2], runs, "lr", "Learning rate")
        panels[2].yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
        metric = next((found for run in runs if (found := _knn_metric(run.lines))), None)
        if metric is None:
            _panel(panels[3], runs, "grad_norm", "Gradient norm before clipping")
        elif len(runs) == 1:
            _knn_panel(panels[3], runs[0], metric)
        else:
            _knn_comparison(panels[3], runs, metric)

    return _figure(4, columns, runs, draw)


def resource_curves(runs: Sequence[Series], columns: int = WIDE) -> bytes | None:
    """Waiting for data, speed, and use and power of the GPU where they were logged.

    Args:
        runs: Runs, one curve each.
        columns: As for :func:`training_curves`.

    Returns:
        SVG; None if nothing was logged.
    """
    logged = [key for key in RESOURCES if any(key in line for run in runs for line in run.lines)]
    if not logged:
        return None

    def draw(panels: Sequence["Axes"]) -> None:
        from matplotlib.ticker import PercentFormatter

        for axes, key in zip(panels, logged, strict=True):
            title, is_fraction = RESOURCES[key]
            _panel(axes, runs, key, title)
            axes.set_ylim(bottom=0)
            if is_fraction:
                axes.set_ylim(0, 1)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))

    return _figure(len(logged), columns, runs, draw)


def _figure(count: int, columns: int, runs: Sequence[Series], draw: Any) -> bytes:
    width, height = PANEL_INCHES[columns]
    rows = math.ceil(count / columns)
    legend = 0.3 * math.ceil(len(runs) * 2 / columns) if len(runs) > 1 else 0.0
    with style.figure(width * min(columns, count), height * rows + legend) as figure:
        draw(figure.subplots(rows, min(columns, count), squeeze=False).flatten().tolist())
        share = legend / (height * rows + legend)
        figure.tight_layout(w_pad=2.0, h_pad=1.5, rect=(0, share, 1, 1))
        if legend:
            _legend(figure, runs, columns)
        return style.figure_to_svg(figure)


def _legend(figure: "Figure", runs: Sequence[Series], columns: int) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], **_line(number), label=run.name) for number, run in enumerate(runs)]
    figure.legend(handles=entries, loc="lower left", ncols=max(1, columns // 2), handlelength=3.2)


def _line(number: int) -> dict[str, Any]:
    """Colour and dashes of a run."""
    return {
        "color": style.SERIES[number % len(style.SERIES)],
        "linestyle": style.DASHES[number % len(style.DASHES)],
    }


def _panel(
    axes: "Axes", runs: Sequence[Series], key: str, title: str, limit: float | None = None, limit_label: str = ""
) -> None:
    axes.set_title(title)
    _step_axis(axes)
    curves = {number: found for number, run in enumerate(runs) if len(found := points(run.lines, key))}
    if not curves:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=style.MUTED)
        return
    if limit is not None:
        axes.axhline(limit, color=style.UNTRAINED, linewidth=1, linestyle=(0, (4, 3)))
        values = np.concatenate([found[:, 1] for found in curves.values()])
        low, high = min(values.min(), limit), max(values.max(), limit)
        position: Any = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(limit_label, (1.0, high), **position, ha="right", fontsize=7.5, color=style.MUTED)
        axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.14 * (high - low or 1))
    for number, found in curves.items():
        axes.plot(*found.T, **_line(number), marker="o" if len(found) == 1 else None, markersize=3)


def points(lines: Lines, key: str) -> np.ndarray:
    """Steps and finite values of a logged number: float64 (N, 2), with N at most :data:`POINTS`; means of more."""
    found = np.array(
        [(line["step"], line[key]) for line in lines if _is_number(line.get(key)) and _is_number(line.get("step"))],
        dtype=np.float64,
    ).reshape(-1, 2)
    if len(found) <= POINTS:
        return found
    return np.array([part.mean(0) for part in np.array_split(found, POINTS)])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _knn_metric(lines: Lines) -> str | None:
    """The first accuracy in the teacher's scores, e.g. ``knn_20_accuracy``."""
    for line in lines:
        teacher = line.get("evaluation", {}).get("teacher", {})
        for name in teacher:
            if name.endswith("_accuracy") and "balanced" not in name:
                return name
    return None


def _evaluations(lines: Lines) -> list[tuple[int, Mapping[str, Any]]]:
    return [(line["step"], line["evaluation"]) for line in lines if "evaluation" in line]


def _knn_panel(axes: "Axes", run: Series, metric: str) -> None:
    _knn_axes(axes, metric)
    evaluations = _evaluations(run.lines)
    for network, colour in ((TEACHER, style.TRAINED), (STUDENT, style.REGION)):
        found = [(step, scores[network][metric]) for step, scores in evaluations if metric in scores.get(network, {})]
        if found:
            steps, values = zip(*found, strict=True)
            axes.plot(steps, values, color=colour, marker="o", markersize=3, label=network)
    baselines = {name: x for _, scores in evaluations for name, x in baselines_of(scores, run.pretrained).items()}
    for (name, scores), dashes in zip(baselines.items(), ((4, 3), (1, 2), (6, 2, 1, 2)), strict=False):
        line = {"color": style.UNTRAINED, "linewidth": 1, "linestyle": (0, dashes), "label": in_words(name)}
        axes.axhline(scores[metric], **line)
    axes.legend(loc="best")


def _knn_comparison(axes: "Axes", runs: Sequence[Series], metric: str) -> None:
    _knn_axes(axes, metric)
    for number, run in enumerate(runs):
        found = [(step, x[TEACHER][metric]) for step, x in _evaluations(run.lines) if metric in x.get(TEACHER, {})]
        if found:
            axes.plot(*zip(*found, strict=True), **_line(number), marker="o", markersize=3)


def _knn_axes(axes: "Axes", metric: str) -> None:
    axes.set_title(metric.replace("_", " ").replace("knn", "kNN"))
    _step_axis(axes)


def _step_axis(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
