"""Random parameters of the views of a tile: box, flips, 90° rotation, colour factors, blur.

Data workers draw these numbers; the training device applies them (:mod:`dino.crops.images`). The distributions
are those of torchvision's ``RandomResizedCrop`` and ``ColorJitter``, as used by facebookresearch/dino, and of HED stain
jitter (Tellez et al. 2018, "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to train
distilled stain-invariant convolutional networks"; Tellez et al. 2019, arXiv 1902.06543).
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from dino.config.schema import PatchAugConfig
from dino.errors import ConfigError

GLOBAL_VIEWS = 2  # the views that the teacher sees
JITTER_ORDERS = np.array(list(itertools.permutations(range(4))))  # (24, 4); 0 brightness 1 contrast 2 saturation 3 hue
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
ATTEMPTS = 10
MAX_HUE = 0.5
PROBABILITIES = ("horizontal_flip", "vertical_flip", "hed_jitter", "color_jitter", "grayscale", "solarize")
STRENGTHS = ("brightness", "contrast", "saturation", "hue", "hed_strength")
SPACINGS = ("global_spacing_um", "local_spacing_um")
RANGES = ("global_crops_scale", "local_crops_scale", "blur_sigma")


def check_range(aug: Any, names: Iterable[str], low: float, high: float = math.inf) -> None:
    """Check that settings are from ``low`` to ``high``; for a list, all of its values.

    Args:
        aug: The ``aug`` settings of a level.
        names: Names of the settings to check.
        low: Smallest allowed value.
        high: Largest allowed value.

    Raises:
        ConfigError: If a value is out of the range.
    """
    for name in names:
        value = getattr(aug, name)
        if not all(low <= number <= high for number in (value if isinstance(value, list) else [value])):
            allowed = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise ConfigError(f"expected aug.{name} {allowed}, found {value}; set a value in this range")


def check_patch_aug(aug: PatchAugConfig) -> None:
    """Check every range of level 1's augmentations.

    Raises:
        ConfigError: If a size, range or probability is out of its range.
    """
    for name in (*RANGES, "blur_global"):
        if len(getattr(aug, name)) != 2:
            raise ConfigError(f"expected two numbers for aug.{name}, found {getattr(aug, name)}")
    for name in RANGES:
        low, high = getattr(aug, name)
        if not (0 < low <= high and (high <= 1 or name == "blur_sigma")):
            bounds = "0 < low <= high" if name == "blur_sigma" else "0 < low <= high <= 1"
            raise ConfigError(f"expected aug.{name} with {bounds}, found {[low, high]}; set such a range")
    check_range(aug, ("global_crops_size", "local_crops_size"), 1)
    check_range(aug, ("local_crops_number",), 0)
    check_range(aug, (*PROBABILITIES, "blur_global", "blur_local"), 0, 1)
    check_range(aug, STRENGTHS, 0)
    check_range(aug, ("hue",), 0, MAX_HUE)


def picture_spacings(aug: PatchAugConfig, spacing_um: float) -> tuple[float, ...]:
    """Spacings in µm per px of the pictures that the views of a sample are cut from.

    Args:
        aug: Crops.
        spacing_um: Spacing of tiling, of views whose spacing is not set.

    Returns:
        Those of the global and the local views; nothing where all views are cut from one picture.

    Raises:
        ConfigError: If they are not two positive numbers, or there are no local views.
    """
    if not across_scales(aug):
        return ()
    settings = {name: getattr(aug, name) for name in SPACINGS}
    found = tuple(spacing_um if value is None else value for value in settings.values())
    if min(found) <= 0 or found[0] == found[1] or aug.local_crops_number == 0:
        set_to = " and ".join(f"aug.{name}={value}" for name, value in settings.items() if value is not None)
        raise ConfigError(
            f"expected different positive spacings of global and local crops, found {set_to} with "
            f"aug.local_crops_number={aug.local_crops_number} and tiles of {spacing_um:g} µm/px; for one spacing use "
            "sampling.spacing_um"
        )
    return found


def across_scales(aug: PatchAugConfig) -> bool:
    """Whether global and local views are cut from pictures of different spacings."""
    return any(getattr(aug, name) is not None for name in SPACINGS)


class ViewDrawer:
    """Draws the parameters of all views of a tile at once, with a number of NumPy calls that does not depend on V.

    Attributes:
        sizes: Side of each of the V views in px: two global views, then the local ones.
        pictures: Which of a sample's pictures each view is cut from: 0, or 1 for local views of another spacing.
    """

    def __init__(self, aug: PatchAugConfig) -> None:
        """Expand the settings to one array per parameter.

        Raises:
            ConfigError: If a setting is out of its range.
        """
        check_patch_aug(aug)
        self.aug, local = aug, aug.local_crops_number
        self.sizes = [aug.global_crops_size] * GLOBAL_VIEWS + [aug.local_crops_size] * local
        self.pictures = [0] * GLOBAL_VIEWS + [int(across_scales(aug))] * local
        self.scale = np.array([aug.global_crops_scale] * GLOBAL_VIEWS + [aug.local_crops_scale] * local)  # (V, 2)
        blur = [*aug.blur_global] + [aug.blur_local] * local
        solarize = [0.0, aug.solarize] + [0.0] * local
        shared = (aug.horizontal_flip, aug.vertical_flip, aug.hed_jitter, aug.color_jitter, aug.grayscale)
        self.probabilities = np.array([(*shared, *own) for own in zip(blur, solarize, strict=True)])  # (V, 7)
        widths = np.array([aug.brightness, aug.contrast, aug.saturation])
        self.factor_low = np.array([*np.maximum(0, 1 - widths), -aug.hue])  # (4,)
        self.factor_high = np.array([*(1 + widths), aug.hue])

    def __call__(self, height: int, width: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw the parameters of every view.

        The number of random numbers is the same for all outcomes, so that changing one probability does not change the
        other parameters.

        Args:
            height: Height of the tile, in px.
            width: Width of the tile, in px.
            rng: Random number generator.

        Returns:
            One array per parameter, each with the leading dim V:

            - ``box`` (V, 4) int64: top, left, height, width in px of the tile, or of the picture of the view
            - ``flip_x``, ``flip_y`` (V,) bool
            - ``turns`` (V,) int64: counter-clockwise rotation in units of 90°
            - ``hed_scale``, ``hed_shift`` (V, 3) float32: 1 and 0 without stain jitter
            - ``jitter_order`` (V,) int64: row of ``JITTER_ORDERS``, -1 without colour jitter
            - ``brightness``, ``contrast``, ``saturation``, ``hue`` (V,) float32
            - ``grayscale``, ``solarize`` (V,) bool
            - ``sigma`` (V,) float32: standard deviation of the blur in px of the view, 0 without blur
        """
        aug, count = self.aug, len(self.sizes)
        flip_x, flip_y, hed, jitter, grayscale, blur, solarize = (
            rng.random(self.probabilities.shape) < self.probabilities
        ).T
        factors = _between(rng.random((count, 4)), self.factor_low, self.factor_high)
        factors = np.where(jitter[:, None], factors, np.array([1.0, 1.0, 1.0, 0.0])).astype(np.float32)
        order = (rng.random(count) * len(JITTER_ORDERS)).astype(np.int64)
        turns = (rng.random(count) * 4 * aug.quarter_turns).astype(np.int64)
        stains = np.where(hed[:, None], (2 * rng.random((count, 6)) - 1) * aug.hed_strength, 0)
        sigma = _between(rng.random(count), *aug.blur_sigma)
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


def draw_boxes(scale: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw crop boxes with the distribution of torchvision's ``RandomResizedCrop.get_params``.

    Area (uniform in ``scale``) and aspect ratio (log-uniform in 3/4 .. 4/3) are drawn ten times. The first draw that
    fits into the tile is used; if none fits, the largest centred box with an allowed aspect ratio.

    Args:
        scale: (V, 2) smallest and largest fraction of the tile's area.
        height: Height of the tile, in px.
        width: Width of the tile, in px.
        rng: Random number generator.

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
    free = np.array([height, width]) - side
    corner = (rng.random((len(scale), 2)) * (free + 1)).astype(np.int64)
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
