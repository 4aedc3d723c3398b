"""What is drawn for one crop of an image: where, how turned, how recoloured.

A worker draws these few numbers; the training device applies them (:mod:`dino.crops.images`). The distributions are
those of torchvision's ``RandomResizedCrop`` and ``ColorJitter``, on which facebookresearch/dino builds, and of HED
stain jitter (Tellez et al. 2018, "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to
train distilled stain-invariant convolutional networks"; Tellez et al. 2019, arXiv 1902.06543).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dino.errors import ConfigError

JITTER_ORDERS = np.array(list(itertools.permutations(range(4))))  # (24, 4); 0 brightness 1 contrast 2 saturation 3 hue
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
ATTEMPTS = 10
MAX_HUE = 0.5
CHANCES = ("horizontal_flip", "vertical_flip", "hed_jitter", "color_jitter", "grayscale", "blur", "solarize")


@dataclass(frozen=True)
class ViewRecipe:
    """How one view (crop) of a tile is drawn.

    Attributes:
        size: Side of the crop as the network sees it, in px.
        scale: Least and greatest share of the tile's area that the crop covers.
        horizontal_flip: Probability of a left-right flip.
        vertical_flip: Probability of an up-down flip.
        quarter_turns: Turn by 0, 90, 180 or 270 degrees, each as likely.
        hed_jitter: Probability of stain jitter.
        hed_strength: Each stain is scaled by 1 +- this and shifted by +- this (in optical density).
        color_jitter: Probability of colour jitter.
        brightness: Brightness factor in ``[max(0, 1 - b), 1 + b]``; contrast and saturation likewise.
        contrast: See ``brightness``.
        saturation: See ``brightness``.
        hue: Hue shift in +- this, in turns; at most 0.5.
        grayscale: Probability of a grey crop.
        blur: Probability of Gaussian blur.
        blur_sigma: Range of the blur's standard deviation, in px of the crop.
        solarize: Probability of solarizing.
    """

    size: int
    scale: tuple[float, float]
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    quarter_turns: bool = False
    hed_jitter: float = 0.0
    hed_strength: float = 0.05
    color_jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            ConfigError: A size, range or probability makes no sense.
        """
        if self.size < 1:
            raise ConfigError(f"a crop's size must be at least 1 px, found {self.size}: set a larger one")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(
                f"a crop's scale must be 0 < low <= high <= 1, found {list(self.scale)}: set such a range"
            )
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ConfigError(f"blur_sigma must be 0 < low <= high, found {list(self.blur_sigma)}: set such a range")
        for name in CHANCES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a probability from 0 to 1, found {getattr(self, name)}: set it in range")
        for name in ("brightness", "contrast", "saturation", "hue", "hed_strength"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, found {getattr(self, name)}: set 0 to turn it off")
        if self.hue > MAX_HUE:
            raise ConfigError(f"hue is in turns, at most {MAX_HUE}, found {self.hue}: set a smaller one")


class ViewDrawer:
    """Draws all views of a sample at once: a few numpy calls, whatever their number."""

    def __init__(self, recipes: Sequence[ViewRecipe]) -> None:
        """Lay the recipes out as one array per setting.

        Args:
            recipes: One recipe per view, V in all.
        """

        def column(name: str) -> np.ndarray:
            return np.array([getattr(r, name) for r in recipes], dtype=np.float64)

        self.count = len(recipes)
        self.scale = column("scale")  # (V, 2)
        self.sigma = column("blur_sigma")  # (V, 2)
        self.turned = column("quarter_turns")  # (V,)
        self.hed_strength = column("hed_strength")[:, None]  # (V, 1)
        self.chances = np.stack([column(name) for name in CHANCES], axis=1)  # (V, 7)
        widths = np.stack([column(n) for n in ("brightness", "contrast", "saturation")], axis=1)  # (V, 3)
        hue = column("hue")[:, None]
        self.factor_low = np.concatenate([np.maximum(0, 1 - widths), -hue], axis=1)  # (V, 4)
        self.factor_high = np.concatenate([1 + widths, hue], axis=1)

    def __call__(self, height: int, width: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw the parameters of every view.

        Each view takes the same count of random numbers whatever comes of them, so that changing one probability
        leaves every other drawn value as it was.

        Args:
            height: Height of the tile, in px.
            width: Width of the tile, in px.
            rng: Where the numbers come from.

        Returns:
            One array per parameter, each with the leading dim V; the keys are those of :func:`draw_view`.
        """
        happens = rng.random((self.count, len(CHANCES))) < self.chances  # (V, 7)
        flip_x, flip_y, hed, jitter, grayscale, blur, solarize = happens.T
        factors = _between(rng.random((self.count, 4)), self.factor_low, self.factor_high)
        factors = np.where(jitter[:, None], factors, np.array([1.0, 1.0, 1.0, 0.0])).astype(np.float32)
        order = (rng.random(self.count) * len(JITTER_ORDERS)).astype(np.int64)
        turns = (rng.random(self.count) * 4 * self.turned).astype(np.int64)
        stains = np.where(hed[:, None], (2 * rng.random((self.count, 6)) - 1) * self.hed_strength, 0)
        sigma = _between(rng.random(self.count), self.sigma[:, 0], self.sigma[:, 1])
        return {
            "box": draw_boxes(self.scale, height, width, rng),
            "flip_x": flip_x,
            "flip_y": flip_y,
            "turns": turns,
            "hed_scale": (1 + stains[:, :3]).astype(np.float32),
            "hed_shift": stains[:, 3:].astype(np.float32),
            "jitter_order": np.where(jitter, order, -1),
            "brightness": factors[:, 0],
            "contrast": factors[:, 1],
            "saturation": factors[:, 2],
            "hue": factors[:, 3],
            "grayscale": grayscale,
            "sigma": np.where(blur, sigma, 0).astype(np.float32),
            "solarize": solarize,
        }


def draw_view(recipe: ViewRecipe, height: int, width: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw one view.

    Args:
        recipe: How.
        height: Height of the tile, in px.
        width: Width of the tile, in px.
        rng: Where the numbers come from.

    Returns:
        ``box`` (4,) int64: top, left, height, width in px of the tile; ``flip_x``, ``flip_y`` bool; ``turns`` int64,
        counter-clockwise quarter turns; ``hed_scale`` (3,) and ``hed_shift`` (3,) float32, 1 and 0 without stain
        jitter; ``jitter_order`` int64, row of ``JITTER_ORDERS`` or -1 without colour jitter; ``brightness``,
        ``contrast``, ``saturation``, ``hue`` float32; ``grayscale`` bool; ``sigma`` float32 in px, 0 without blur;
        ``solarize`` bool.
    """
    return {name: value[0] for name, value in ViewDrawer([recipe])(height, width, rng).items()}


def draw_boxes(scale: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw crop boxes with the distribution of torchvision's ``RandomResizedCrop.get_params``.

    Ten attempts at an area (uniform in ``scale``) and an aspect ratio (log-uniform in 3/4 .. 4/3); the first one that
    fits wins, and when none does the largest centred box of an allowed ratio is taken.

    Args:
        scale: (V, 2) least and greatest share of the tile's area.
        height: Height of the tile, in px.
        width: Width of the tile, in px.
        rng: Where the numbers come from.

    Returns:
        (V, 4) int64: top, left, height, width.
    """
    numbers = rng.random((len(scale), 2, ATTEMPTS))
    area = height * width * _between(numbers[:, 0], scale[:, :1], scale[:, 1:])  # (V, 10)
    ratio = np.exp(_between(numbers[:, 1], *LOG_RATIO))
    sides = np.stack([np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))], axis=-1)  # (V, 10, 2)
    fits = ((sides > 0) & (sides <= (height, width))).all(axis=-1)  # (V, 10)
    views = np.arange(len(scale))
    side = sides[views, fits.argmax(axis=1)].astype(np.int64)  # (V, 2)
    room = np.array([height, width]) - side
    corner = (rng.random((len(scale), 2)) * (room + 1)).astype(np.int64)
    boxes = np.concatenate([corner, side], axis=1)
    boxes[~np.any(fits, axis=1)] = _central_box(height, width)
    return boxes


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    low, high = (math.exp(r) for r in LOG_RATIO)
    box_height, box_width = height, width
    if width / height < low:
        box_height = round(width / low)
    elif width / height > high:
        box_width = round(height * high)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _between(uniform: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    return low + uniform * (high - low)
