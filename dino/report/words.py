"""Figures of words: typical tiles of each, one word over its slides, all words over one slide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dino.extraction.encoder_features import Label
from dino.extraction.words import Count
from dino.report import style
from dino.report.figures import PANEL_HEIGHT, Thumbnail, fill_squares, tile_mask
from dino.report.montages import WIDTH, shorten
from dino.report.page import Figure, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

# In inches.
TEXT_WIDTH, SWATCH, GAP, TITLE = 1.75, 0.14, 0.05, 0.3
CAPTION = 0.2  # above a map
EDGE = 0.01  # so that the frame of a map is not cut
MAP_COLUMNS, MAP_HEIGHT = 3, 4.2
LEGEND_WIDTH, LEGEND_LINE = 2.1, 0.19
OUTLINE = 240  # outlines fit side by side in a thumbnail
TILE_PX = 192  # side of a tile in a strip: more than its inches have dots
LETTERS, LETTERS_LEGEND = 20, 22  # of a name


@dataclass(frozen=True)
class WordMap:
    """Tiles of one slide on its thumbnail.

    Attributes:
        slide_id: The slide.
        thumbnail: The slide.
        corners: Level-0 px, (N, 2): upper left corner of the square that each tile fills.
        square: Side of that square in level-0 px.
        words: (N,) index of the word of each, -1 for none.
    """

    slide_id: str
    thumbnail: Thumbnail
    corners: np.ndarray
    square: float
    words: np.ndarray


@dataclass(frozen=True)
class WordData:
    """The words of an encoder.

    Attributes:
        encoder: Its name.
        labels: Name and colour of each word.
        counts: How often each occurs.
        examples: Typical tiles of each, uint8 (H, W, 3), of different patients where possible.
        slides: Number of slides with features.
        tile_um: Width of a tile in µm; 0 where it is not known.
        map: The words of one slide, if shown.
    """

    encoder: str
    labels: Sequence[Label]
    counts: Sequence[Count]
    examples: Sequence[Sequence[np.ndarray]]
    slides: int
    tile_um: float
    map: WordMap | None = None

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return sum(count.tiles for count in self.counts)


def plural(number: int, noun: str) -> str:
    """A number and a noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def counted(count: Count, total: int) -> list[str]:
    """How often a word occurs, in two lines."""
    where = plural(count.slides, "slide")
    if count.patients is not None:
        where += f", {plural(count.patients, 'patient')}"
    return [f"{count.tiles / max(1, total):.1%} · {plural(count.tiles, 'tile')}", where]


def words_section(words: Sequence[WordData]) -> Section:
    """The words of each encoder, with a map of the shown slide."""
    items: list[Figure | Table] = []
    for data in words:
        names = [label.name for label in data.labels]
        items.append(
            Figure(
                overview(data),
                f"{len(names)} words, each with typical tiles: {', '.join(names)}.",
                f"Features of {data.encoder}. Each row is a word: how many tiles it has, and the tiles nearest to its "
                "centre, of different patients where possible. A good word shows one kind of tissue, from many "
                "patients; one that only few slides have may be an artefact or a stain.",
            )
        )
        if data.map is not None:
            items.append(
                Figure(
                    slide_map(data, data.map),
                    f"Slide {data.map.slide_id}, and its tiles in the colours of their words.",
                    f"Features of {data.encoder}. The words on slide {data.map.slide_id}, and their shares of it.",
                )
            )
    introduction = (
        "Groups of similar tiles of all slides, found by the command dino words, with the names that were written into "
        f"{', '.join(f'words_{data.encoder}/words.csv' for data in words)}."
    )
    return Section("Words", introduction, items)


def overview(data: WordData, encode: style.Encode = style.figure_to_jpeg) -> bytes:
    """One row per word: its name, how often it occurs, and its typical tiles.

    Args:
        data: The words.
        encode: How the figure is encoded.

    Returns:
        The encoded figure.
    """
    most = max(1, *(len(tiles) for tiles in data.examples))
    side = (WIDTH - TEXT_WIDTH) / 16
    row = side + GAP
    height = TITLE + len(data.labels) * row
    width = TEXT_WIDTH + most * side if most < 16 else WIDTH
    with style.figure(max(width, 6.0), height) as figure:
        wide = max(width, 6.0)
        title = f"Words of {plural(data.tiles, 'tile')} of {plural(data.slides, 'slide')}, by {data.encoder}"
        figure.text(0.0, 1 - 0.08 / height, title, fontsize=9.5, va="top")
        for number, (label, count, tiles) in enumerate(zip(data.labels, data.counts, data.examples, strict=True)):
            top = height - TITLE - number * row
            _entry(figure, (0.0, top), label, number, counted(count, data.tiles))
            if tiles:
                strip = _strip(tiles)
                box = (TEXT_WIDTH / wide, (top - side) / height, len(tiles) * side / wide, side / height)
                axes = figure.add_axes(box)
                axes.imshow(strip, interpolation="antialiased", aspect="auto")
                style.hide_axes(axes)
                if number == 0 and data.tile_um:
                    style.scale_bar(axes, data.tile_um / TILE_PX, 2 * TILE_PX)
        return encode(figure)


def one_word(data: WordData, number: int, maps: Sequence[WordMap], encode: style.Encode) -> bytes:
    """One word: its typical tiles, and where it is on the slides that have most of it.

    Args:
        data: The words.
        number: Index of the word.
        maps: The slides.
        encode: How the figure is encoded.

    Returns:
        The encoded figure.
    """
    tiles, label = data.examples[number], data.labels[number]
    columns = 8
    side = WIDTH / columns
    rows = -(-len(tiles) // columns)
    widths = [(WIDTH - GAP * 2 * (MAP_COLUMNS - 1)) / MAP_COLUMNS] * len(maps)
    heights = [
        min(MAP_HEIGHT, width * one.thumbnail.pixels.shape[0] / one.thumbnail.pixels.shape[1])
        for width, one in zip(widths, maps, strict=True)
    ]
    lines = [max(heights[start : start + MAP_COLUMNS]) + CAPTION for start in range(0, len(maps), MAP_COLUMNS)]
    header = 0.62
    height = header + rows * side + sum(lines) + 0.1
    with style.figure(WIDTH, height) as figure:
        _entry(figure, (0.0, height - 0.05), label, number, counted(data.counts[number], data.tiles), LETTERS * 3)
        for row in range(rows):
            part = tiles[row * columns : (row + 1) * columns]
            bottom = height - header - (row + 1) * side
            axes = figure.add_axes((0, bottom / height, len(part) / columns, (side - GAP / 2) / height))
            axes.imshow(_strip(part, 2 * TILE_PX), interpolation="antialiased", aspect="auto")
            style.hide_axes(axes)
            if row == 0 and data.tile_um:
                style.scale_bar(axes, data.tile_um / (2 * TILE_PX), 2 * TILE_PX)
        top = height - header - rows * side - 0.1
        for place, (one, wide, high) in enumerate(zip(maps, widths, heights, strict=True)):
            if place and place % MAP_COLUMNS == 0:
                top -= lines[place // MAP_COLUMNS - 1]
            shape = one.thumbnail.pixels.shape
            across = min(wide, high * shape[1] / shape[0]) - 2 * EDGE
            left = (place % MAP_COLUMNS) * (widths[0] + 2 * GAP) + EDGE
            box = (left / WIDTH, (top - CAPTION - high) / height, across / WIDTH, high / height)
            shown = one.words == number
            name = shorten(one.slide_id, max(8, int(across / 0.075) - 10))
            _map(figure, box, one, shown, [label], f"{name}: {plural(int(shown.sum()), 'tile')}")
        return encode(figure)


def slide_map(data: WordData, one: WordMap, encode: style.Encode = style.figure_to_jpeg) -> bytes:
    """A slide, and the words of its tiles with a legend.

    Args:
        data: The words.
        one: The slide.
        encode: How the figure is encoded.

    Returns:
        The encoded figure.
    """
    found = np.bincount(one.words[one.words >= 0], minlength=len(data.labels))
    used = [int(word) for word in np.argsort(-found, kind="stable") if found[word]]
    shape = one.thumbnail.pixels.shape
    panel = min((WIDTH - LEGEND_WIDTH - 2 * GAP) / 2, PANEL_HEIGHT * 1.3 * shape[1] / shape[0])
    high = panel * shape[0] / shape[1]
    height = max(high, len(used) * LEGEND_LINE + 0.1) + TITLE
    width = 2 * panel + LEGEND_WIDTH + 4 * GAP
    with style.figure(width, height) as figure:
        bottom = height - TITLE - high
        box = (EDGE / width, bottom / height, panel / width, high / height)
        _map(figure, box, one, np.zeros(len(one.words), bool), [], one.slide_id, faded=False)
        box = ((panel + 2 * GAP) / width, *box[1:])
        _map(figure, box, one, one.words >= 0, data.labels, f"Words by {data.encoder}")
        left = 2 * panel + 4 * GAP
        for line, word in enumerate(used):
            y = height - TITLE - line * LEGEND_LINE
            name = shorten(_numbered(data.labels[word].name, word), LETTERS_LEGEND)
            _swatch(figure, left, y, data.labels[word].colour)
            figure.text((left + SWATCH + 0.06) / width, (y - SWATCH / 2) / height, name, fontsize=8, va="center")
            share = f"{found[word] / max(1, found.sum()):.1%}"
            x = (left + LEGEND_WIDTH - 0.02) / width
            figure.text(x, (y - SWATCH / 2) / height, share, fontsize=8, va="center", ha="right", color=style.MUTED)
        return encode(figure)


def _numbered(name: str, word: int) -> str:
    """A name with the number of the word, by which it is found in the table."""
    return name if name == f"Word {word + 1}" else f"{word + 1} {name}"


def _entry(
    figure: "Drawing",
    corner: tuple[float, float],
    label: Label,
    word: int,
    lines: Sequence[str],
    letters: int = LETTERS,
) -> None:
    """Name, colour and numbers of a word; ``corner`` is the upper left one, in inches."""
    width, height = figure.get_size_inches()
    x, y = corner
    _swatch(figure, x, y - 0.02, label.colour)
    name = shorten(_numbered(label.name, word), letters)
    left, text = (x + SWATCH + 0.06) / width, "\n".join(lines)
    figure.text(left, y / height, name, fontsize=8.5, fontweight="bold", va="top")
    figure.text(left, (y - 0.17) / height, text, fontsize=7.5, color=style.MUTED, va="top", linespacing=1.2)


def _swatch(figure: "Drawing", x: float, y: float, colour: tuple[int, int, int]) -> None:
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    figure.add_artist(
        Rectangle(
            (x / width, (y - SWATCH) / height),
            SWATCH / width,
            SWATCH / height,
            facecolor=_rgb(colour),
            edgecolor=style.MUTED,
            linewidth=0.4,
            transform=figure.transFigure,
        )
    )


def _strip(tiles: Sequence[np.ndarray], side: int = TILE_PX) -> np.ndarray:
    """Tiles side by side with white lines between them, uint8 (side, n * side, 3)."""
    strip = np.full((side, len(tiles) * side, 3), 255, np.uint8)
    inner = side - side // 24
    for number, tile in enumerate(tiles):
        small = Image.fromarray(tile).resize((inner, inner), Image.Resampling.LANCZOS)
        strip[:inner, number * side : number * side + inner] = np.asarray(small)
    return strip


def _map(
    figure: "Drawing",
    box: tuple[float, float, float, float],
    one: WordMap,
    shown: np.ndarray,
    labels: Sequence[Label],
    title: str,
    *,
    faded: bool = True,
) -> None:
    """The slide with the tiles of ``shown`` filled with the colours of their words, or of the only label."""
    words = one.words[shown] if len(labels) > 1 else np.zeros(int(shown.sum()), np.int64)
    colours = np.array([_rgb(label.colour) for label in labels]).reshape(-1, 3)
    pixels = one.thumbnail.pixels
    if faded:
        pixels = fill_squares(one.thumbnail, one.corners[shown], one.square, colours[words])
    if len(labels) == 1:  # the tissue itself, with an outline; with several colours the squares are filled
        inside = tile_mask(one.thumbnail, one.corners[shown], one.square)
        edge = inside & ~_eroded(inside, max(2, max(inside.shape) // OUTLINE))
        pixels = np.where((inside & ~edge)[..., None], one.thumbnail.pixels, pixels)
    axes = figure.add_axes(box)
    style.hide_axes(axes, title)
    axes.imshow(pixels, interpolation="antialiased")
    axes.spines[:].set_visible(True)
    style.scale_bar(axes, one.thumbnail.um_per_px, pixels.shape[1])


def _eroded(mask: np.ndarray, count: int) -> np.ndarray:
    """A mask without what is nearer than ``count`` px to its outside; px beyond the picture are inside."""
    for axis in (0, 1):
        padded = np.pad(mask, [(count, count) if axis == this else (0, 0) for this in (0, 1)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * count + 1, axis)
        mask = np.asarray(windows.all(-1))
    return mask


def _rgb(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255
