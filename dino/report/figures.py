"""Figures of a report, as JPEG or SVG: maps of a slide, crops, neighbours, attention, training curves."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.evaluate.verdict import STUDENT, TEACHER, baselines_of, in_words
from dino.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]

# Maps of a slide, in inches.
PANEL_HEIGHT = 5.2  # two panels of a portrait slide side by side fit on one screen
PANEL_GAP = 0.15
PANEL_TITLE = 0.3

# Montages, in inches.
IMAGE_GAP = 0.08
TEXT_LINE = 0.2  # above a row or below an image

# Attention.
COLOURS = "OrRd"  # from light to dark: strong attention is visible on pale glass and on grey tissue
FOCUSED = 2.0  # minimum multiple of the uniform weight that is shown in the deepest red
MAX_OPACITY = 0.85  # opacity of the strongest attention: the tissue below stays visible

# ------------------------------------------------------------------------------------------- maps of a slide


@dataclass(frozen=True)
class Thumbnail:
    """Image of a whole slide.

    Attributes:
        pixels: uint8, (H, W, 3).
        downsample: Level-0 px per px of the thumbnail.
        um_per_px: µm per px of the thumbnail.
    """

    pixels: np.ndarray
    downsample: float
    um_per_px: float


def tiling_map(
    thumbnail: Thumbnail, tiles: np.ndarray, side: float, regions: np.ndarray, shown: Sequence[int] = ()
) -> bytes:
    """Three panels: the slide, its tiles, its regions.

    Args:
        thumbnail: The slide.
        tiles: Level-0 px, (N, 2): x, y of each tile's upper left corner.
        side: Side of a tile in level-0 px.
        regions: Level-0 px, (M, 4): x, y, width, height.
        shown: Indices of the regions with a bold outline; the others have a faint one.

    Returns:
        JPEG.
    """
    with _panels(thumbnail, 3) as (figure, axes):
        _show(axes[0], thumbnail, "The slide")
        _show(axes[1], thumbnail, _count(len(tiles), "tile"))
        axes[1].images[0].set_data(_fade(thumbnail.pixels, tile_mask(thumbnail, tiles, side)))
        squares = np.concatenate([tiles, np.full((len(tiles), 2), side)], axis=1)  # (N, 4)
        _outline(axes[1], thumbnail, squares, edgecolor=style.TRAINED, linewidth=0.5, alpha=0.6)
        _show(axes[2], thumbnail, _count(len(regions), "region"))
        axes[2].images[0].set_data(_fade(thumbnail.pixels, np.zeros(thumbnail.pixels.shape[:2], dtype=bool), 0.6))
        _outline(axes[2], thumbnail, regions, edgecolor=style.REGION, linewidth=0.6, alpha=0.45)
        _outline(axes[2], thumbnail, regions[list(shown)], edgecolor=style.REGION, linewidth=1.8)
        return style.figure_to_jpeg(figure)


def feature_maps(
    thumbnail: Thumbnail, panels: Sequence[tuple[str, np.ndarray]], corners: np.ndarray, square: float
) -> bytes:
    """The slide, then one panel per model with every tile filled with a colour.

    Args:
        thumbnail: The slide.
        panels: Title and colours (float, (N, 3) in [0, 1]) of each model.
        corners: Level-0 px, (N, 2): upper left corner of the square that is filled for each tile.
        square: Side of that square in level-0 px.

    Returns:
        JPEG.
    """
    with _panels(thumbnail, 1 + len(panels)) as (figure, axes):
        _show(axes[0], thumbnail, "The slide")
        for axis, (title, colours) in zip(axes[1:], panels, strict=True):
            _show(axis, thumbnail, title)
            axis.images[0].set_data(fill_squares(thumbnail, corners, square, colours))
        return style.figure_to_jpeg(figure)


def tile_mask(thumbnail: Thumbnail, tiles: np.ndarray, side: float) -> np.ndarray:
    """Px of the thumbnail that are in at least one tile: bool, (H, W)."""
    mask = np.zeros(thumbnail.pixels.shape[:2], dtype=bool)
    for rows, columns in _slices(thumbnail, tiles, side):
        mask[rows, columns] = True
    return mask


def fill_squares(thumbnail: Thumbnail, corners: np.ndarray, square: float, colours: np.ndarray) -> np.ndarray:
    """The faded thumbnail with squares filled with colours.

    Args:
        thumbnail: The slide.
        corners: Level-0 px, (N, 2): upper left corners of the squares.
        square: Their side in level-0 px.
        colours: Float, (N, 3) in [0, 1].

    Returns:
        uint8, (H, W, 3).
    """
    canvas = _fade(thumbnail.pixels, np.zeros(thumbnail.pixels.shape[:2], dtype=bool))
    filled = np.rint(colours * 255).astype(np.uint8)
    for (rows, columns), colour in zip(_slices(thumbnail, corners, square), filled, strict=True):
        canvas[rows, columns] = colour
    return canvas


def _slices(thumbnail: Thumbnail, corners: np.ndarray, side: float) -> list[tuple[slice, slice]]:
    """Row and column slices of level-0 squares; both edges are rounded, which leaves no gap between neighbours."""
    low = np.rint(np.asarray(corners) / thumbnail.downsample).astype(int)  # (N, 2): x, y
    high = np.rint((np.asarray(corners) + side) / thumbnail.downsample).astype(int)
    return [(slice(y0, y1), slice(x0, x1)) for (x0, y0), (x1, y1) in zip(low, high, strict=True)]


def _outline(axes: "Axes", thumbnail: Thumbnail, boxes: np.ndarray, **properties: Any) -> None:
    """Draw level-0 boxes, (N, 4): x, y, width, height."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    scaled = boxes / thumbnail.downsample
    patches = [Rectangle((x, y), width, height) for x, y, width, height in scaled]
    axes.add_collection(PatchCollection(patches, facecolor="none", **properties))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _fade(pixels: np.ndarray, mask: np.ndarray, strength: float = 0.35) -> np.ndarray:
    """The image with everything outside ``mask`` faded to white, to ``strength`` of its contrast."""
    faded = 255 - (255 - pixels.astype(np.float32)) * strength
    return np.where(mask[..., None], pixels, faded.astype(np.uint8))


def _show(axes: "Axes", thumbnail: Thumbnail, title: str) -> None:
    style.hide_axes(axes, title)
    axes.imshow(thumbnail.pixels, interpolation="antialiased")
    axes.spines[:].set_visible(True)
    style.scale_bar(axes, thumbnail.um_per_px, thumbnail.pixels.shape[1])


@contextmanager
def _panels(thumbnail: Thumbnail, count: int) -> Iterator[tuple["Figure", "np.ndarray"]]:
    """A figure of ``count`` panels with the slide's aspect ratio, and its axes."""
    height, width = thumbnail.pixels.shape[:2]
    panel_width = min((11 - PANEL_GAP * (count - 1)) / count, PANEL_HEIGHT * width / height)
    panel_height = panel_width * height / width
    with style.figure(count * panel_width + (count - 1) * PANEL_GAP, panel_height + PANEL_TITLE) as figure:
        axes = figure.subplots(1, count, squeeze=False)[0]
        top = panel_height / (panel_height + PANEL_TITLE)
        figure.subplots_adjust(left=0.002, right=0.998, bottom=0.003, top=top, wspace=PANEL_GAP / panel_width)
        yield figure, axes


# ------------------------------------------------------------------------------------------------- montages


@dataclass(frozen=True)
class MontageImage:
    """One image of a montage.

    Attributes:
        pixels: uint8 (H, W, 3).
        note: A short text below it.
        um_per_px: Spacing for a scale bar; 0 for no scale bar.
        size: Side relative to the largest image.
    """

    pixels: np.ndarray
    note: str = ""
    um_per_px: float = 0.0
    size: float = 1.0


def montage(
    rows: Sequence[Sequence[MontageImage | None]],
    titles: Sequence[str],
    *,
    width: float = 11.0,
    split: int | None = None,
) -> bytes:
    """Images in rows and columns.

    Args:
        rows: Rows of equal length; None leaves a cell empty.
        titles: One title per column, "" for none.
        width: Total width in inches.
        split: Column with some extra space to its left.

    Returns:
        JPEG.
    """
    extra = 0.3 if split is not None else 0.0
    sizes = [max((row[c].size for row in rows if row[c]), default=1.0) for c in range(len(titles))]  # type: ignore[union-attr]
    side = (width - IMAGE_GAP * (len(titles) - 1) - extra) / sum(sizes)
    starts = np.cumsum([0.0, *(side * size + IMAGE_GAP for size in sizes[:-1])])
    lefts = [float(start) + (extra if split is not None and c >= split else 0.0) for c, start in enumerate(starts)]
    below = TEXT_LINE if any(image and image.note for row in rows for image in row) else 0.0
    height = TEXT_LINE + len(rows) * (side + below + IMAGE_GAP)
    with style.figure(width, height) as figure:
        for left, title in zip(lefts, titles, strict=True):
            figure.text(left / width, (height - TEXT_LINE + 0.05) / height, title, fontsize=8.5, va="bottom")
        for r, row in enumerate(rows):
            bottom = height - TEXT_LINE - r * (side + below + IMAGE_GAP) - side
            for left, image in zip(lefts, row, strict=True):
                if image is not None:
                    _draw_image(figure, image, left, bottom, side)
        return style.figure_to_jpeg(figure)


def _draw_image(figure: "Figure", image: MontageImage, left: float, bottom: float, side: float) -> None:
    """Draw one image at the left of its column, vertically centred in its row; lengths in inches."""
    width, height = figure.get_size_inches()
    shown = side * image.size
    middle = bottom + (side - shown) / 2
    axes = figure.add_axes((left / width, middle / height, shown / width, shown / height))
    axes.imshow(image.pixels, interpolation="antialiased", aspect="auto")
    style.hide_axes(axes)
    if image.um_per_px:
        style.scale_bar(axes, image.um_per_px, image.pixels.shape[1])
    x, y = (left + shown / 2) / width, (bottom - 0.04) / height
    figure.text(x, y, image.note, fontsize=7.5, color=style.MUTED, va="top", ha="center")


def crop_montage(tiles: Sequence[np.ndarray], crops: Sequence[Sequence[np.ndarray]], um_per_px: float) -> bytes:
    """One tile per row, followed by its crops.

    Args:
        tiles: uint8, (H, W, 3) each.
        crops: Crops of each tile, uint8 (s, s, 3), global ones first.
        um_per_px: µm per px of the tiles.

    Returns:
        JPEG.
    """
    largest = max(crop.shape[0] for row in crops for crop in row)
    rows = [
        [
            MontageImage(tile, um_per_px=um_per_px),
            *(MontageImage(crop, size=_display_size(crop.shape[0] / largest)) for crop in row),
        ]
        for tile, row in zip(tiles, crops, strict=True)
    ]
    views = crops[0]
    titles = ["tile", *(f"{'global' if v < 2 else 'local'}, {crop.shape[0]} px" for v, crop in enumerate(views))]
    titles = [title if i < 2 or title != titles[i - 1] else "" for i, title in enumerate(titles)]
    return montage(rows, titles, split=1)


def neighbour_montage(
    queries: Sequence[np.ndarray],
    trained: Sequence[Sequence[MontageImage]],
    untrained: Sequence[Sequence[MontageImage]],
) -> bytes:
    """Query tiles and their nearest neighbours: of the trained model on the left, of the untrained one on the right.

    Args:
        queries: uint8, (H, W, 3) each.
        trained: Neighbours of each query, nearest first.
        untrained: The same for the untrained model.

    Returns:
        JPEG.
    """
    count = len(trained[0])
    rows = [
        [MontageImage(query), *left, *right] for query, left, right in zip(queries, trained, untrained, strict=True)
    ]
    titles = ["query", "trained: nearest first", *[""] * (count - 1), "untrained: nearest first", *[""] * (count - 1)]
    return montage(rows, titles, split=1 + count)


def _display_size(ratio: float) -> float:
    """Local crops are drawn smaller than global ones, but large enough to be recognised."""
    return max(0.6, ratio)


# ------------------------------------------------------------------------------------------------ attention


def attention_overlay(pixels: np.ndarray, attention: np.ndarray, *, smooth: bool = True) -> np.ndarray:
    """Attention weights in red over the tissue in grey.

    Weights are relative to the uniform weight 1 / (h w): weights up to 1 are not coloured, and the deepest red is the
    99th percentile of the map, but at least 2. A nearly uniform map therefore stays grey; scaled to its own range, it
    would show noise.

    Args:
        pixels: uint8, (H, W, 3).
        attention: Non-negative weights, (h, w).
        smooth: Interpolate between the weights; False draws one square per weight.

    Returns:
        uint8, (H, W, 3).
    """
    from matplotlib import colormaps
    from PIL import Image

    height, width = pixels.shape[:2]
    ratio = attention / max(float(attention.mean()), 1e-12)
    deepest = max(FOCUSED, float(np.percentile(ratio, 99)))
    stretched = np.clip((ratio - 1) / (deepest - 1), 0.0, 1.0).astype(np.float32)
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    weight = np.clip(np.asarray(Image.fromarray(stretched).resize((width, height), resample)), 0.0, 1.0)
    grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W)
    pale = (255 - (255 - grey) * 0.75)[..., None]
    colour = colormaps[COLOURS](0.25 + 0.7 * weight)[..., :3].astype(np.float32) * 255
    opacity = (MAX_OPACITY * weight)[..., None]
    return np.rint(pale * (1 - opacity) + colour * opacity).astype(np.uint8)


def attention_montage(
    images: Sequence[np.ndarray],
    trained: np.ndarray,
    untrained: np.ndarray | None,
    um_per_px: float,
    *,
    heads: Sequence[int] = (0, 1, 2),
    smooth: bool = True,
) -> bytes:
    """One row per image: the tissue, the mean over heads, single heads, and the mean of the untrained model.

    Args:
        images: uint8, (H, W, 3) each.
        trained: Attention weights of the trained model, (n, heads, h, w).
        untrained: The same for the untrained model, or None.
        um_per_px: µm per px of the images.
        heads: Heads with a column; heads that the model does not have are skipped.
        smooth: Interpolate between the weights.

    Returns:
        JPEG.
    """
    heads = [head for head in heads if head < trained.shape[1]]
    rows = []
    for index, pixels in enumerate(images):
        maps = [trained[index].mean(0), *(trained[index, head] for head in heads)]
        maps += [untrained[index].mean(0)] if untrained is not None else []
        overlays = [MontageImage(attention_overlay(pixels, weights, smooth=smooth)) for weights in maps]
        rows.append([MontageImage(pixels, um_per_px=um_per_px), *overlays])
    titles = ["tissue", "mean over heads", *(f"head {head + 1}" for head in heads)]
    titles += ["untrained, mean"] if untrained is not None else []
    # Columns are at most as wide as in a montage of six columns.
    width = min(11.0, 11.0 * len(titles) / 6)
    return montage(rows, titles, width=width, split=len(titles) - 1 if untrained is not None else None)


# ------------------------------------------------------------------------------------------ training curves


def training_curves(lines: Lines, pretrained: bool = False) -> bytes:
    """Loss, teacher entropy, learning rate, and kNN scores (without scores: the gradient norm) over the steps.

    Args:
        lines: Lines of a run's ``metrics.jsonl``; a panel without values shows "not recorded".
        pretrained: Whether the run started from ``model.init``.

    Returns:
        SVG.
    """
    with style.figure(11, 2.75) as figure:
        axes = figure.subplots(1, 4)
        _curve_panel(axes[0], lines, "loss_relative", "Loss, relative to ln K", limit=1.0, limit_label="uniform guess")
        entropy = "teacher_entropy_relative"
        _curve_panel(axes[1], lines, entropy, "Teacher entropy, relative to ln K", limit=1.0, limit_label="uniform")
        _curve_panel(axes[2], lines, "lr", "Learning rate")
        axes[2].yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
        metric = _knn_metric(lines)
        if metric:
            _knn_panel(axes[3], lines, metric, pretrained)
        else:
            _curve_panel(axes[3], lines, "grad_norm", "Gradient norm before clipping")
        figure.tight_layout(w_pad=2.0)
        return style.figure_to_svg(figure)


def _curve_panel(
    axes: "Axes", lines: Lines, key: str, title: str, limit: float | None = None, limit_label: str = ""
) -> None:
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    axes.set_title(title)
    _step_axis(axes)
    if not points:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=style.MUTED)
        return
    steps, values = zip(*points, strict=True)
    if limit is not None:
        axes.axhline(limit, color=style.UNTRAINED, linewidth=1, linestyle=(0, (4, 3)))
        low, high = min(*values, limit), max(*values, limit)
        position: Any = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(limit_label, (1.0, high), **position, ha="right", fontsize=7.5, color=style.MUTED)
        axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.14 * (high - low or 1))
    axes.plot(steps, values, color=style.TRAINED, marker="o" if len(steps) == 1 else None, markersize=3)


def _knn_metric(lines: Lines) -> str | None:
    """The first accuracy in the teacher's scores, e.g. ``knn_20_accuracy``."""
    for line in lines:
        teacher = line.get("evaluation", {}).get("teacher", {})
        for name in teacher:
            if name.endswith("_accuracy") and "balanced" not in name:
                return name
    return None


def _knn_panel(axes: "Axes", lines: Lines, metric: str, pretrained: bool) -> None:
    axes.set_title(metric.replace("_", " ").replace("knn", "kNN"))
    _step_axis(axes)
    evaluations = [(line["step"], line["evaluation"]) for line in lines if "evaluation" in line]
    for network, colour in ((TEACHER, style.TRAINED), (STUDENT, style.REGION)):
        points = [(step, found[network][metric]) for step, found in evaluations if metric in found.get(network, {})]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, marker="o", markersize=3, label=network)
    baselines = {name: x for _, found in evaluations for name, x in baselines_of(found, pretrained).items()}
    for (name, scores), dashes in zip(baselines.items(), ((4, 3), (1, 2), (6, 2, 1, 2)), strict=False):
        line = {"color": style.UNTRAINED, "linewidth": 1, "linestyle": (0, dashes), "label": in_words(name)}
        axes.axhline(scores[metric], **line)
    axes.legend(loc="best")


def _step_axis(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
