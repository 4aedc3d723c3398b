"""Style shared by all figures: colours, fonts, scale bars, and the encoding as SVG or JPEG."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = "#1f2933"
MUTED = "#7b8794"
LINE = "#d9dee3"
TRAINED = "#1f6f78"
UNTRAINED = "#a39a8f"
REGION = "#b4532a"
# Of runs that are compared: distinct also to colour-blind readers, and in grey by their dashes.
SERIES = (TRAINED, REGION, "#4b5aa3", "#b08400", "#8a3f7a", "#4f8a3c")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

CSS_PX_PER_INCH = 96  # also for SVG: a figure of 11 inches fills the text width of the page
JPEG_DPI = 144  # 1.5 px per CSS px: sharp on most screens at an acceptable file size
JPEG_QUALITY = 76
SVG = "image/svg+xml"

FORMATS = ("png", "pdf", "svg")  # of single figures

Encode = Callable[["Figure"], bytes]

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 8.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # text stays text: sharp and searchable
    "pdf.fonttype": 42,  # also in PDF, where it can be edited
    "svg.hashsalt": "histodino",  # element ids are the same in every run
    "figure.facecolor": "white",
}


@contextmanager
def figure(width: float, height: float) -> Iterator["Figure"]:
    """A figure in the style of the report, independent of any global matplotlib state.

    Args:
        width: Width in inches; 11 fills the page.
        height: Height in inches.

    Yields:
        The empty figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # A Figure created without pyplot is not registered globally: it needs no closing and no display.
    with matplotlib.rc_context(_RC):
        yield Figure(figsize=(width, height))


def figure_to_svg(figure: "Figure") -> bytes:
    """The figure as SVG without a background, for lines and text on a light or dark page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return buffer.getvalue()


def figure_to_jpeg(figure: "Figure") -> bytes:
    """The figure as JPEG, for tissue: a fifth of the size of a PNG without visible loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(JPEG_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return image_to_jpeg(np.asarray(canvas.buffer_rgba())[..., :3])


def encoder(kind: str, dpi: int) -> Encode:
    """The function that encodes a figure for a publication.

    Args:
        kind: One of :data:`FORMATS`. In PDF and SVG, text and lines are vectors.
        dpi: Pixels per inch of tissue and, in PNG, of everything.
    """
    metadata = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None, "Creator": None}}[kind]

    def encode(figure: "Figure") -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
        return buffer.getvalue()

    return encode


def image_to_jpeg(pixels: np.ndarray) -> bytes:
    """An image as JPEG.

    Args:
        pixels: uint8, (H, W, 3).
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def media_type(content: bytes) -> str:
    """MIME type of an encoded figure, from its first bytes.

    Raises:
        ValueError: If it is neither PNG, JPEG nor SVG.
    """
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if b"<svg" in content[:1000]:
        return SVG
    raise ValueError("expected PNG, JPEG or SVG bytes, found something else")


def display_width(content: bytes) -> int | None:
    """Width in CSS px at which a PNG or JPEG figure has its intended size; None for SVG, which contains its size."""
    from PIL import Image

    if media_type(content) == SVG:
        return None
    with Image.open(io.BytesIO(content)) as picture:
        return round(picture.width * CSS_PX_PER_INCH / JPEG_DPI)


def hide_axes(axes: "Axes", title: str = "", *, colour: str = TEXT) -> None:
    """Remove ticks, grid and frame, and set an optional title."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, color=colour)


def scale_bar(axes: "Axes", um_per_px: float, extent_px: float) -> None:
    """Draw a scale bar at the lower left of ``axes``, of a round length up to a quarter of the width.

    Args:
        axes: Axes whose data units are px of the picture, y downwards.
        um_per_px: µm per data unit.
        extent_px: Width of the picture in data units.
    """
    length_um = round_length(extent_px * um_per_px / 4)
    length = length_um / um_per_px
    bottom, top = axes.get_ylim()
    height = abs(bottom - top)
    left, base = 0.05 * extent_px, max(bottom, top) - 0.06 * height
    axes.plot([left, left + length], [base, base], color="white", linewidth=5, solid_capstyle="butt")
    axes.plot([left, left + length], [base, base], color=TEXT, linewidth=2.5, solid_capstyle="butt")
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    place = {"xytext": (0, 3), "textcoords": "offset points"}  # clear of the bar, however small the picture is
    text = axes.annotate(label, (left, base), **place, fontsize=7.5, color=TEXT, va="bottom")
    text.set_path_effects([_halo()])


def round_length(limit: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is at most ``limit``."""
    power = 10.0 ** np.floor(np.log10(limit))
    return float(max(step * power for step in (1, 2, 5) if step * power <= limit * (1 + 1e-9)))


def _halo() -> Any:
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=2.5, foreground="white")
