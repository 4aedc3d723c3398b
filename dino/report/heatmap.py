"""Values of tiles or regions in place on a slide, averaged where these overlap."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dino.report import style
from dino.report.figures import PANEL_HEIGHT, Thumbnail
from dino.report.montages import COLOURS, FOCUSED, MAX_OPACITY

WIDTH = 11.0  # inches at most, with the colour bar
GAP = 0.12  # between panels
BAR = 1.0  # inches for the colour bar and its text


def place(thumbnail: Thumbnail, boxes: np.ndarray, maps: Sequence[np.ndarray]) -> np.ndarray:
    """Maps of parts of a slide at the places of these parts, averaged where parts overlap.

    Args:
        thumbnail: The slide.
        boxes: Level-0 px, (N, 4): x, y, width, height of each part.
        maps: Values of each part, (h, w), which cover it evenly.

    Returns:
        float64, (H, W) of the thumbnail; NaN where there is no part.
    """
    limits = thumbnail.pixels.shape[:2]
    total, count = np.zeros(limits), np.zeros(limits)
    for (x, y, width, height), values in zip(boxes / thumbnail.downsample, maps, strict=True):
        rows, columns = _covered(y, height, limits[0]), _covered(x, width, limits[1])
        # The value of the cell in which the centre of a px of the thumbnail lies.
        across = ((columns + 0.5 - x) * values.shape[1] / width).astype(int).clip(0, values.shape[1] - 1)
        down = ((rows + 0.5 - y) * values.shape[0] / height).astype(int).clip(0, values.shape[0] - 1)
        total[np.ix_(rows, columns)] += values[np.ix_(down, across)]
        count[np.ix_(rows, columns)] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _covered(start: float, length: float, limit: int) -> np.ndarray:
    """Px whose centres lie in ``[start, start + length)``."""
    first, last = max(0, int(np.ceil(start - 0.5))), min(limit, int(np.ceil(start + length - 0.5)))
    return np.arange(first, max(first, last))


def heatmap(thumbnail: Thumbnail, maps: Sequence[tuple[str, np.ndarray]], encode: style.Encode) -> bytes:
    """The slide, and maps of values relative to their uniform value in red over the slide in grey.

    Args:
        thumbnail: The slide.
        maps: What each is, and values as :func:`place` returns them; 1 is uniform and not coloured, the 99th percentile
            of all maps (at least 2) is the deepest red.
        encode: How the figure is encoded.

    Returns:
        The encoded figure.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    known = [values[np.isfinite(values)] for _, values in maps]
    deepest = max([FOCUSED, *(float(np.percentile(one, 99)) for one in known if len(one))])
    grey = np.asarray(Image.fromarray(thumbnail.pixels).convert("L"), dtype=np.float64)[..., None]
    pale = 255 - (255 - grey) * 0.75

    def drawn(values: np.ndarray) -> np.ndarray:
        weight = np.nan_to_num(np.clip((values - 1) / (deepest - 1), 0.0, 1.0))[..., None]
        colours = colormaps[COLOURS](0.25 + 0.7 * weight[..., 0])[..., :3] * 255
        return np.rint(pale * (1 - MAX_OPACITY * weight) + colours * MAX_OPACITY * weight).astype(np.uint8)

    height, width = thumbnail.pixels.shape[:2]
    count = 1 + len(maps)
    panel = min((WIDTH - BAR - GAP * (count - 1)) / count, PANEL_HEIGHT * width / height)
    size = count * panel + GAP * (count - 1) + BAR, panel * height / width + 0.3
    panels = [("The slide", thumbnail.pixels), *((label, drawn(values)) for label, values in maps)]
    with style.figure(*size) as figure:
        for number, (title, pixels) in enumerate(panels):
            left = number * (panel + GAP) / size[0]
            axes = figure.add_axes((left, 0.003, panel / size[0], (size[1] - 0.3) / size[1]))
            style.hide_axes(axes, title)
            axes.imshow(pixels, interpolation="antialiased")
            style.scale_bar(axes, thumbnail.um_per_px, width)
        # The colours as they look on white.
        ramp = np.linspace(0, 1, 256)[:, None]
        shown = 1 - MAX_OPACITY * ramp * (1 - colormaps[COLOURS](0.25 + 0.7 * ramp[:, 0])[:, :3])
        mappable = ScalarMappable(Normalize(1, deepest), ListedColormap(shown.tolist()))
        bar = figure.add_axes(((count * (panel + GAP)) / size[0], 0.15, 0.14 / size[0], 0.6))
        figure.colorbar(mappable, cax=bar, label="relative to uniform")
        return encode(figure)
