"""Training curves from the lines of ``metrics.jsonl``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dino.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Sequence[Mapping[str, Any]]


def curves(lines: Lines) -> bytes:
    """Loss, teacher entropy and learning rate over steps, and kNN scores (else the gradient norm).

    Args:
        lines: Lines of a run's ``metrics.jsonl``; a panel whose values are absent says so.

    Returns:
        SVG.
    """
    with style.figure(11, 2.75) as figure:
        axes = figure.subplots(1, 4)
        _panel(axes[0], lines, "loss_relative", "Loss, relative to ln K", limit=1.0, note="uniform guess")
        _panel(
            axes[1], lines, "teacher_entropy_relative", "Teacher entropy, relative to ln K", limit=1.0, note="uniform"
        )
        _panel(axes[2], lines, "lr", "Learning rate")
        axes[2].yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
        metric = _knn_metric(lines)
        if metric:
            _knn_panel(axes[3], lines, metric)
        else:
            _panel(axes[3], lines, "grad_norm", "Gradient norm before clipping")
        figure.tight_layout(w_pad=2.0)
        return style.svg(figure)


def _panel(axes: "Axes", lines: Lines, key: str, title: str, limit: float | None = None, note: str = "") -> None:
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    axes.set_title(title)
    _count_steps(axes)
    if not points:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=style.QUIET)
        return
    steps, values = zip(*points, strict=True)
    if limit is not None:
        axes.axhline(limit, color=style.UNTRAINED, linewidth=1, linestyle=(0, (4, 3)))
        low, high = min(*values, limit), max(*values, limit)
        axes.annotate(note, (1.0, high), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right", fontsize=7.5,
                      textcoords="offset points", color=style.QUIET)  # fmt: skip
        axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.14 * (high - low or 1))
    axes.plot(steps, values, color=style.TRAINED, marker="o" if len(steps) == 1 else None, markersize=3)


def _knn_metric(lines: Lines) -> str | None:
    """The first accuracy that the teacher was scored by, e.g. ``knn_20_accuracy``."""
    for line in lines:
        teacher = line.get("evaluation", {}).get("teacher", {})
        for name in teacher:
            if name.endswith("_accuracy") and "balanced" not in name:
                return name
    return None


def _knn_panel(axes: "Axes", lines: Lines, metric: str) -> None:
    axes.set_title(metric.replace("_", " ").replace("knn", "kNN"))
    _count_steps(axes)
    colours = {"teacher": style.TRAINED, "student": style.REGION, "untrained": style.UNTRAINED}
    for who, colour in colours.items():
        scores = [(x["step"], x["evaluation"].get(who, {}).get(metric)) for x in lines if "evaluation" in x]
        points = [(step, score) for step, score in scores if score is not None]
        if points and who == "untrained":
            axes.axhline(points[0][1], color=colour, linewidth=1, linestyle=(0, (4, 3)), label=who)
        elif points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, marker="o", markersize=3, label=who)
    axes.legend(loc="best")


def _count_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
