"""Sheets of small pictures in rows and columns: crops and neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dino.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 0.08  # inches between pictures
LINE = 0.2  # inches for a line of text above a row or below a picture


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet.

    Attributes:
        pixels: uint8 (H, W, 3).
        note: A few characters below it.
        um_per_px: Draw a scale bar for this spacing; 0 for none.
        size: Side as a share of the largest, for crops that are smaller than their neighbours.
    """

    pixels: np.ndarray
    note: str = ""
    um_per_px: float = 0.0
    size: float = 1.0


def sheet(
    rows: Sequence[Sequence[Cell | None]], titles: Sequence[str], *, width: float = 11.0, split: int | None = None
) -> bytes:
    """Pictures in a grid.

    Args:
        rows: Equal numbers of cells; None leaves a place empty.
        titles: One title per column, "" for none.
        width: Width of the sheet in inches.
        split: Draw a little more room before this column.

    Returns:
        JPEG.
    """
    extra = 0.3 if split is not None else 0.0
    shares = [max((row[c].size for row in rows if row[c]), default=1.0) for c in range(len(titles))]  # type: ignore[union-attr]
    side = (width - GAP * (len(titles) - 1) - extra) / sum(shares)
    starts = np.cumsum([0.0, *(side * share + GAP for share in shares[:-1])])
    lefts = [float(start) + (extra if split is not None and c >= split else 0.0) for c, start in enumerate(starts)]
    below = LINE if any(cell and cell.note for row in rows for cell in row) else 0.0
    height = LINE + len(rows) * (side + below + GAP)
    with style.figure(width, height) as figure:
        for left, title in zip(lefts, titles, strict=True):
            figure.text(left / width, (height - LINE + 0.05) / height, title, fontsize=8.5, va="bottom")
        for r, row in enumerate(rows):
            bottom = height - LINE - r * (side + below + GAP) - side
            for left, cell in zip(lefts, row, strict=True):
                if cell is not None:
                    _place(figure, cell, left, bottom, side)
        return style.photo(figure)


def _place(figure: "Figure", cell: Cell, left: float, bottom: float, side: float) -> None:
    """Put one picture at the left of its column, in the middle of its row; all lengths in inches."""
    width, height = figure.get_size_inches()
    shown = side * cell.size
    middle = bottom + (side - shown) / 2
    axes = figure.add_axes((left / width, middle / height, shown / width, shown / height))
    axes.imshow(cell.pixels, interpolation="antialiased", aspect="auto")
    style.bare(axes)
    if cell.um_per_px:
        style.scale_bar(axes, cell.um_per_px, cell.pixels.shape[1])
    x, y = (left + shown / 2) / width, (bottom - 0.04) / height
    figure.text(x, y, cell.note, fontsize=7.5, color=style.QUIET, va="top", ha="center")


def crop_sheet(tiles: Sequence[np.ndarray], crops: Sequence[Sequence[np.ndarray]], um_per_px: float) -> bytes:
    """Tiles, one per row, each followed by the crops that the network sees of it.

    Args:
        tiles: uint8, (H, W, 3) each.
        crops: For each tile its crops, uint8 (s, s, 3), in the order of the views.
        um_per_px: µm per px of the tiles.

    Returns:
        JPEG.
    """
    largest = max(crop.shape[0] for row in crops for crop in row)
    rows = [
        [Cell(tile, um_per_px=um_per_px), *(Cell(crop, size=_shown(crop.shape[0] / largest)) for crop in row)]
        for tile, row in zip(tiles, crops, strict=True)
    ]
    views = crops[0]
    titles = ["tile", *(f"{'global' if v < 2 else 'local'}, {crop.shape[0]} px" for v, crop in enumerate(views))]
    titles = [title if i < 2 or title != titles[i - 1] else "" for i, title in enumerate(titles)]
    return sheet(rows, titles, split=1)


def neighbour_sheet(
    queries: Sequence[np.ndarray], trained: Sequence[Sequence[Cell]], untrained: Sequence[Sequence[Cell]]
) -> bytes:
    """Query tiles with their nearest tiles: by the trained model on the left, by the untrained one on the right.

    Args:
        queries: uint8, (H, W, 3) each.
        trained: For each query its neighbours, nearest first.
        untrained: The same by the untrained network.

    Returns:
        JPEG.
    """
    count = len(trained[0])
    rows = [[Cell(query), *left, *right] for query, left, right in zip(queries, trained, untrained, strict=True)]
    titles = ["query", "trained: nearest first", *[""] * (count - 1), "untrained: nearest first", *[""] * (count - 1)]
    return sheet(rows, titles, split=1 + count)


def _shown(share: float) -> float:
    """Local crops stay recognisably smaller, but never so small that nothing can be made out."""
    return max(0.6, share)
