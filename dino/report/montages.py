"""Montages of tissue: crops, neighbours, attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dino.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Montages, in inches.
IMAGE_GAP = 0.08
TEXT_LINE = 0.2  # above the columns
NOTE_POINTS, NOTE_LINE, NOTE_GAP, NOTE_LETTER = 7.5, 0.13, 0.09, 0.068  # below an image; width of a letter
WIDTH = 11.0  # fills the page
LARGEST_TILE = 1.8  # of a montage of neighbours

# Attention.
COLOURS = "OrRd"  # from light to dark: strong attention is visible on pale glass and on grey tissue
FOCUSED = 2.0  # minimum multiple of the uniform weight that is shown in the deepest red
MAX_OPACITY = 0.85  # opacity of the strongest attention: the tissue below stays visible


@dataclass(frozen=True)
class MontageImage:
    """One image of a montage.

    Attributes:
        pixels: uint8 (H, W, 3).
        notes: Lines of text below it; what does not fit is shortened in its middle.
        um_per_px: Spacing for a scale bar; 0 for no scale bar.
        size: Side relative to the largest image.
    """

    pixels: np.ndarray
    notes: Sequence[str] = ()
    um_per_px: float = 0.0
    size: float = 1.0


def montage(
    rows: Sequence[Sequence[MontageImage | None]],
    titles: Sequence[str],
    *,
    width: float = WIDTH,
    split: int | None = None,
    encode: style.Encode = style.figure_to_jpeg,
) -> bytes:
    """Images in rows and columns.

    Args:
        rows: Rows of equal length; None leaves a cell empty.
        titles: One title per column, "" for none.
        width: Total width in inches.
        split: Column with some extra space to its left.
        encode: How the figure is encoded.

    Returns:
        The encoded figure.
    """
    extra = 0.3 if split is not None else 0.0
    sizes = [max((row[c].size for row in rows if row[c]), default=1.0) for c in range(len(titles))]  # type: ignore[union-attr]
    side = (width - IMAGE_GAP * (len(titles) - 1) - extra) / sum(sizes)
    starts = np.cumsum([0.0, *(side * size + IMAGE_GAP for size in sizes[:-1])])
    lefts = [float(start) + (extra if split is not None and c >= split else 0.0) for c, start in enumerate(starts)]
    lines = max((len(image.notes) for row in rows for image in row if image), default=0)
    below = NOTE_LINE * lines + NOTE_GAP if lines else 0.0
    height = TEXT_LINE + len(rows) * (side + below + IMAGE_GAP)
    with style.figure(width, height) as figure:
        for left, title in zip(lefts, titles, strict=True):
            figure.text(left / width, (height - TEXT_LINE + 0.05) / height, title, fontsize=8.5, va="bottom")
        for r, row in enumerate(rows):
            bottom = height - TEXT_LINE - r * (side + below + IMAGE_GAP) - side
            for left, image in zip(lefts, row, strict=True):
                if image is not None:
                    _draw_image(figure, image, left, bottom, side)
        return encode(figure)


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
    letters = max(4, int(shown / NOTE_LETTER))
    text = "\n".join(shorten(note, letters) for note in image.notes)
    figure.text(x, y, text, fontsize=NOTE_POINTS, color=style.MUTED, va="top", ha="center", linespacing=1.15)


def shorten(text: str, letters: int) -> str:
    """A text with its middle left out if it has more than ``letters`` letters."""
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (letters - 1 - head) :]}"


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
    queries: Sequence[MontageImage],
    trained: Sequence[Sequence[MontageImage]],
    untrained: Sequence[Sequence[MontageImage]],
    encode: style.Encode = style.figure_to_jpeg,
) -> bytes:
    """Query tiles and their nearest neighbours: of the trained model on the left, of the untrained one on the right.

    Args:
        queries: The tiles.
        trained: Neighbours of each query, nearest first.
        untrained: The same for the untrained model; empty for none.
        encode: How the figure is encoded.

    Returns:
        The encoded figure.
    """
    sides = [side for side in (trained, untrained) if side]
    counts = [max(len(row) for row in side) for side in sides]
    rows: list[list[MontageImage | None]] = []
    for index, query in enumerate(queries):
        rows.append([query])
        for side, count in zip(sides, counts, strict=True):
            rows[-1] += [*side[index], *[None] * (count - len(side[index]))]
    titles = ["query"]
    for name, count in zip(("trained", "untrained"), counts, strict=False):
        titles += [f"{name}: nearest first", *[""] * (count - 1)]
    width = min(WIDTH, LARGEST_TILE * len(titles))
    return montage(rows, titles, width=width, split=1 + counts[0] if len(sides) > 1 else None, encode=encode)


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
    encode: style.Encode = style.figure_to_jpeg,
) -> bytes:
    """One row per image: the tissue, the mean over heads, single heads, and the mean of the untrained model.

    Args:
        images: uint8, (H, W, 3) each.
        trained: Attention weights of the trained model, (n, heads, h, w).
        untrained: The same for the untrained model, or None.
        um_per_px: µm per px of the images.
        heads: Heads with a column; heads that the model does not have are skipped.
        smooth: Interpolate between the weights.
        encode: How the figure is encoded.

    Returns:
        The encoded figure.
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
    width = min(WIDTH, WIDTH * len(titles) / 6)
    return montage(rows, titles, width=width, split=len(titles) - 1 if untrained is not None else None, encode=encode)
