"""The crops of a tile one after another, with the parameters that this package draws: by Pillow, and by torchvision v2.

Drawing is left to :class:`dino.crops.images.ImageCrops`, so that all three make the same crops and can be compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv
from torchvision.transforms.v2 import functional as v2

from dino.crops.colour import blur_radius
from dino.crops.parameters import JITTER_ORDERS

JITTERS = ("brightness", "contrast", "saturation", "hue")
THRESHOLD = 128  # of solarize, in grey levels

Drawn = Mapping[str, np.ndarray]


def _changes(drawn: Drawn, view: int) -> list[tuple[str, float]]:
    """Colour changes of one view in their drawn order."""
    order = int(drawn["jitter_order"][view])
    if order < 0:
        return []
    names = [JITTERS[i] for i in JITTER_ORDERS[order]]
    return [(name, float(drawn[name][view])) for name in names]


class PillowCrops:
    """Each crop by Pillow's 8-bit operations, as torchvision's first transforms and the original do.

    Args:
        sizes: Side of each view in px.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    def __init__(self, sizes: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.sizes, self.mean, self.std = list(sizes), list(mean), list(std)

    def __call__(self, image: Image.Image, drawn: Drawn) -> list[Tensor]:
        """V tensors (3, s, s) of an RGB image."""
        return [self._view(image, drawn, view) for view in range(len(self.sizes))]

    def _view(self, image: Image.Image, drawn: Drawn, view: int) -> Tensor:
        (top, left, height, width), size = map(int, drawn["box"][view]), self.sizes[view]
        crop: Any = tv.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)  # type: ignore[arg-type]
        crop = tv.hflip(crop) if drawn["flip_x"][view] else crop
        crop = tv.vflip(crop) if drawn["flip_y"][view] else crop
        for name, factor in _changes(drawn, view):
            crop = getattr(tv, f"adjust_{name}")(crop, factor)
        crop = tv.rgb_to_grayscale(crop, 3) if drawn["grayscale"][view] else crop
        sigma = float(drawn["sigma"][view])
        crop = crop.filter(ImageFilter.GaussianBlur(radius=sigma)) if sigma > 0 else crop
        crop = ImageOps.solarize(crop, THRESHOLD) if drawn["solarize"][view] else crop
        return tv.normalize(tv.to_tensor(crop), self.mean, self.std)


class TensorCrops:
    """Each crop by torchvision v2 on 8-bit tensors, as its documentation advises for speed.

    Args:
        sizes: Side of each view in px.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        largest_sigma: Largest standard deviation of the blur: it decides the size of the kernel.
    """

    def __init__(
        self, sizes: Sequence[int], mean: Sequence[float], std: Sequence[float], largest_sigma: float = 2.0
    ) -> None:
        self.sizes, self.mean, self.std, self.largest_sigma = list(sizes), list(mean), list(std), largest_sigma

    def __call__(self, pixels: Tensor, drawn: Drawn) -> list[Tensor]:
        """V tensors (3, s, s) of a uint8 tensor (3, H, W)."""
        return [self._view(pixels, drawn, view) for view in range(len(self.sizes))]

    def _view(self, pixels: Tensor, drawn: Drawn, view: int) -> Tensor:
        (top, left, height, width), size = map(int, drawn["box"][view]), self.sizes[view]
        crop = v2.resized_crop(
            pixels, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True
        )
        crop = v2.horizontal_flip(crop) if drawn["flip_x"][view] else crop
        crop = v2.vertical_flip(crop) if drawn["flip_y"][view] else crop
        for name, factor in _changes(drawn, view):
            crop = getattr(v2, f"adjust_{name}")(crop, factor)
        crop = v2.rgb_to_grayscale(crop, 3) if drawn["grayscale"][view] else crop
        sigma = float(drawn["sigma"][view])
        if sigma > 0:
            taps = 2 * blur_radius(self.largest_sigma, size) + 1
            crop = v2.gaussian_blur(crop, [taps, taps], [sigma, sigma])
        crop = v2.solarize(crop, THRESHOLD) if drawn["solarize"][view] else crop
        return v2.normalize(v2.to_dtype(crop, torch.float32, scale=True), self.mean, self.std)
