"""Figure of an evaluation of robustness: neighbours of each kind, and maps of the features by label and confounder."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dino import randomness
from dino.evaluate.confounders import OO, OS, SO, SS, Design
from dino.report import style
from dino.report.projection import pca, unit_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

DPI = 150
WIDTH = 11.0  # inches
BAR, BARS_MARGIN, MAP = 0.3, 1.15, 3.3  # heights in inches
MAPPED = 3000  # rows at most in a map, drawn at random
NAMED = 12  # entries of a legend at most
NAME_LETTERS = 30
LEGEND_LETTERS = 90  # in a line of a legend
POINT = 9.0  # area in square points; smaller where there are many
# From biology, on the left, to the confounder, on the right.
KIND_COLOURS = {SO: style.TRAINED, SS: "#a9cdd0", OO: "#e3e6e9", OS: style.REGION}
LABEL_COLOURS = ("#1b7f8c", "#d98c1f", "#5b4a9e", "#c23b5a", "#5f8f2f", "#2f5fa8", "#8a5a2b", "#7d7f83")
VALUE_COLOURS = ("#3d6fb6", "#e07b39", "#3f9b57", "#b0419b", "#c9a400", "#6b6f76", "#20a3a3", "#a33b2a")


@dataclass(frozen=True)
class Shown:
    """Features of a model or baseline.

    Attributes:
        name: Its name.
        neighbours: Fraction of each kind of neighbour, in the order of :data:`dino.evaluate.confounders.KINDS`.
        features: ``(M, D)`` features; None for no maps.
    """

    name: str
    neighbours: Sequence[float]
    features: NDArray[Any] | None = None


def robustness_figure(shown: Sequence[Shown], found: Design) -> bytes:
    """Bars of the kinds of neighbours, and for each entry with features maps coloured by label and by confounder.

    Maps are the first two principal components of the features scaled to length 1, and, where the package
    ``umap-learn`` is installed, UMAP of them.

    Args:
        shown: Models and baselines.
        found: Labels and confounders of the rows of the features.

    Returns:
        A PNG.
    """
    mapped = [one for one in shown if one.features is not None]
    bars_height = BARS_MARGIN + BAR * len(shown)
    with style.figure(WIDTH, bars_height + MAP * len(mapped)) as drawn:
        heights = [bars_height, *[MAP] * len(mapped)]
        parts = drawn.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_bars(parts[0], shown, found.by, bars_height)
        for part, one in zip(parts[1:], mapped, strict=True):
            _draw_maps(part, one, found)
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _draw_bars(part: "Figure | SubFigure", shown: Sequence[Shown], by: str, height: float) -> None:
    axes = part.subplots()
    words = {
        SO: f"same class, other {by}",
        SS: f"same class, same {by}",
        OO: f"other class, other {by}",
        OS: f"other class, same {by}",
    }
    left = np.zeros(len(shown))
    for kind, colour in KIND_COLOURS.items():
        widths = np.array([one.neighbours[kind] for one in shown])
        axes.barh(range(len(shown)), widths, left=left, height=0.68, color=colour, label=words[kind])
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= 0.04:
                light = kind in (SO, OS)
                text = {"color": "white" if light else style.TEXT, "fontsize": 8, "ha": "center", "va": "center"}
                axes.text(start + width / 2, row, f"{width:.0%}", **text)
        left += widths
    axes.set_yticks(range(len(shown)), [_short(one.name) for one in shown])
    axes.tick_params(axis="y", labelcolor=style.TEXT)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title("Nearest neighbours, of other patients", pad=24)
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2, handlelength=1.0)
    part.subplots_adjust(left=0.2, right=0.98, top=1 - 0.75 / height, bottom=0.12 / height)


def _draw_maps(part: "Figure | SubFigure", one: Shown, found: Design) -> None:
    assert one.features is not None
    generator = randomness.generator(0, 0, "rows of a map")
    rows = generator.permutation(len(one.features))[:MAPPED]  # in random order: no class covers another one
    maps = _projections(np.asarray(one.features)[rows])
    panels = part.subplots(1, 2 * len(maps), squeeze=False)[0]
    columns = [
        (found.labels[rows], found.classes, LABEL_COLOURS, "label"),
        (found.confounders[rows], found.values, VALUE_COLOURS, found.by),
    ]
    for i, (names, points) in enumerate(maps.items()):
        for j, (numbers, words, colours, title) in enumerate(columns):
            axes = panels[2 * i + j]
            scatter(axes, points, numbers, words, colours)
            axes.set_xlabel(names[0])
            axes.set_ylabel(names[1] if j == 0 else "")
            axes.set_title(f"{_short(one.name)}, by {title}" if i == j == 0 else f"by {title}")
    part.subplots_adjust(left=0.05, right=0.99, top=0.9, bottom=0.24, wspace=0.12)


def scatter(
    axes: "Axes", points: NDArray[np.float64], numbers: NDArray[np.int64], words: Sequence[str], colours: Sequence[str]
) -> None:
    """Draw points, (M, 2), in the colours of their classes, with a legend.

    Args:
        axes: Where to draw.
        points: The points.
        numbers: Class of each, (M,).
        words: Names of the classes.
        colours: Their colours, which repeat.
    """
    of_class = np.array(colours)[np.arange(len(words)) % len(colours)]
    size = POINT * min(1.0, (600 / len(points)) ** 0.5)
    axes.scatter(*points.T, s=size, c=of_class[numbers], alpha=0.75, linewidths=0)
    named = [_short(name) for name in words[:NAMED]]
    for name, colour in zip(named, of_class, strict=False):
        axes.scatter([], [], s=18, color=colour, label=name)
    if len(words) > NAMED:
        axes.scatter([], [], s=0, label=f"and {len(words) - NAMED} more")
    columns = min(6, len(named), max(1, LEGEND_LETTERS // (4 + max(map(len, named)))))
    where = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.1)}
    axes.legend(ncols=columns, handletextpad=0.1, columnspacing=1.0, **where)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(True)


def _projections(features: NDArray[Any]) -> Mapping[tuple[str, str], NDArray[np.float64]]:
    """Maps ``(M, 2)`` of the features, by the names of their axes."""
    points, (first, second) = pca(features, 2)
    maps = {(f"PC 1 ({first:.0%} of the variance)", f"PC 2 ({second:.0%})"): points}
    if importlib.util.find_spec("umap") is not None:
        import umap  # pyright: ignore[reportMissingImports]

        maps["UMAP 1", "UMAP 2"] = umap.UMAP(random_state=0).fit_transform(unit_rows(features))
    return maps


def _short(name: str) -> str:
    return name if len(name) <= NAME_LETTERS else f"…{name[1 - NAME_LETTERS :]}"
