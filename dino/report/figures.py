"""Maps of a slide: its tiles and regions, and values or colours of its tiles."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Maps of a slide, in inches.
PANEL_HEIGHT = 5.2  # two panels of a portrait slide side by side fit on one screen
PANEL_GAP = 0.15
PANEL_TITLE = 0.3


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
    thumbnail: Thumbnail,
    panels: Sequence[tuple[str, np.ndarray]],
    corners: np.ndarray,
    square: float,
    encode: style.Encode = style.figure_to_jpeg,
) -> bytes:
    """The slide, then one panel per model with every tile filled with a colour.

    Args:
        thumbnail: The slide.
        panels: Title and colours (float, (N, 3) in [0, 1]) of each model.
        corners: Level-0 px, (N, 2): upper left corner of the square that is filled for each tile.
        square: Side of that square in level-0 px.
        encode: How the figure is encoded.

    Returns:
        The encoded figure.
    """
    with _panels(thumbnail, 1 + len(panels)) as (figure, axes):
        _show(axes[0], thumbnail, "The slide")
        for axis, (title, colours) in zip(axes[1:], panels, strict=True):
            _show(axis, thumbnail, title)
            axis.images[0].set_data(fill_squares(thumbnail, corners, square, colours))
        return encode(figure)


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
