"""Pictures that lie over a slide: where tiles and regions are, and features or attention in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_HEIGHT = 5.2  # inches: two panels of a portrait slide side by side stay on one screen
GAP = 0.15
TITLE = 0.3


@dataclass(frozen=True)
class Ground:
    """The slide that a map is drawn on.

    Attributes:
        thumbnail: uint8, (H, W, 3).
        downsample: Level-0 px per thumbnail px.
        um_per_px: µm per thumbnail px.
    """

    thumbnail: np.ndarray
    downsample: float
    um_per_px: float


def tiling_map(ground: Ground, tiles: np.ndarray, side: float, regions: np.ndarray, shown: Sequence[int] = ()) -> bytes:
    """The bare slide, where its tiles lie, and where its regions lie.

    Args:
        ground: The slide.
        tiles: Level-0 px, (N, 2): x, y of each tile's upper left corner.
        side: Side of a tile in level-0 px.
        regions: Level-0 px, (M, 4): x, y, width, height.
        shown: Indices of regions that are outlined boldly (all are, faintly).

    Returns:
        JPEG.
    """
    with _panels(ground, 3) as (figure, axes):
        _lay(axes[0], ground, "The slide")
        _lay(axes[1], ground, _counted(len(tiles), "tile"))
        axes[1].images[0].set_data(_wash(ground.thumbnail, coverage(ground, tiles, side)))
        squares = np.concatenate([tiles, np.full((len(tiles), 2), side)], axis=1)  # (N, 4)
        _outline(axes[1], ground, squares, edgecolor=style.TRAINED, linewidth=0.5, alpha=0.6)
        _lay(axes[2], ground, _counted(len(regions), "region"))
        axes[2].images[0].set_data(_wash(ground.thumbnail, np.zeros(ground.thumbnail.shape[:2], dtype=bool), 0.6))
        _outline(axes[2], ground, regions, edgecolor=style.REGION, linewidth=0.6, alpha=0.45)
        _outline(axes[2], ground, regions[list(shown)], edgecolor=style.REGION, linewidth=1.8)
        return style.photo(figure)


def feature_maps(ground: Ground, panels: Sequence[tuple[str, np.ndarray]], tiles: np.ndarray, square: float) -> bytes:
    """Colours of tiles in their places, one panel per model, the bare slide first.

    Args:
        ground: The slide.
        panels: Title and colours (float, (N, 3) in [0, 1]) of each model.
        tiles: Level-0 px, (N, 2): upper left corner of the square that each tile colours.
        square: Side of that square in level-0 px.

    Returns:
        JPEG.
    """
    with _panels(ground, 1 + len(panels)) as (figure, axes):
        _lay(axes[0], ground, "The slide")
        for axis, (title, colours) in zip(axes[1:], panels, strict=True):
            _lay(axis, ground, title)
            axis.images[0].set_data(paint(ground, tiles, square, colours))
        return style.photo(figure)


def coverage(ground: Ground, tiles: np.ndarray, side: float) -> np.ndarray:
    """Which thumbnail px lie in at least one tile: bool, (H, W)."""
    covered = np.zeros(ground.thumbnail.shape[:2], dtype=bool)
    for rows, columns in _boxes(ground, tiles, side):
        covered[rows, columns] = True
    return covered


def paint(ground: Ground, tiles: np.ndarray, square: float, colours: np.ndarray) -> np.ndarray:
    """The faded thumbnail with each tile's square filled with its colour.

    Args:
        ground: The slide.
        tiles: Level-0 px, (N, 2): upper left corners of the squares.
        square: Their side in level-0 px.
        colours: Float, (N, 3) in [0, 1].

    Returns:
        uint8, (H, W, 3).
    """
    canvas = _wash(ground.thumbnail, np.zeros(ground.thumbnail.shape[:2], dtype=bool))
    filled = np.rint(colours * 255).astype(np.uint8)
    for (rows, columns), colour in zip(_boxes(ground, tiles, square), filled, strict=True):
        canvas[rows, columns] = colour
    return canvas


def _boxes(ground: Ground, corners: np.ndarray, side: float) -> list[tuple[slice, slice]]:
    """Row and column slices of level-0 squares; both edges are rounded, so that neighbours meet without a seam."""
    low = np.rint(np.asarray(corners) / ground.downsample).astype(int)  # (N, 2): x, y
    high = np.rint((np.asarray(corners) + side) / ground.downsample).astype(int)
    return [(slice(y0, y1), slice(x0, x1)) for (x0, y0), (x1, y1) in zip(low, high, strict=True)]


def _outline(axes: "Axes", ground: Ground, boxes: np.ndarray, **look: Any) -> None:
    """Draw level-0 boxes, (N, 4): x, y, width, height."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    scaled = boxes / ground.downsample
    patches = [Rectangle((x, y), width, height) for x, y, width, height in scaled]
    axes.add_collection(PatchCollection(patches, facecolor="none", **look))


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _wash(thumbnail: np.ndarray, kept: np.ndarray, strength: float = 0.35) -> np.ndarray:
    """The picture with everything outside ``kept`` faded towards white, to ``strength`` of its contrast."""
    faded = 255 - (255 - thumbnail.astype(np.float32)) * strength
    return np.where(kept[..., None], thumbnail, faded.astype(np.uint8))


def _lay(axes: "Axes", ground: Ground, title: str) -> None:
    style.bare(axes, title)
    axes.imshow(ground.thumbnail, interpolation="antialiased")
    axes.spines[:].set_visible(True)
    style.scale_bar(axes, ground.um_per_px, ground.thumbnail.shape[1])


@contextmanager
def _panels(ground: Ground, count: int) -> Iterator[tuple["Figure", "np.ndarray"]]:
    """A figure of ``count`` panels in the slide's proportions, and its axes."""
    height, width = ground.thumbnail.shape[:2]
    panel_width = min((11 - GAP * (count - 1)) / count, PANEL_HEIGHT * width / height)
    panel_height = panel_width * height / width
    with style.figure(count * panel_width + (count - 1) * GAP, panel_height + TITLE) as figure:
        axes = figure.subplots(1, count, squeeze=False)[0]
        top = panel_height / (panel_height + TITLE)
        figure.subplots_adjust(left=0.002, right=0.998, bottom=0.003, top=top, wspace=GAP / panel_width)
        yield figure, axes
