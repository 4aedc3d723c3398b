"""Crops of tiles: drawn by a data worker, applied to the whole batch on the training device."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from dino.crops import colour
from dino.crops.blur import blur_radius, gaussian_blur
from dino.crops.orientation import fold_turns
from dino.crops.parameters import JITTER_ORDERS, ViewDrawer, ViewRecipe
from dino.crops.resample import resize_boxed, resize_dense, to_device
from dino.threads import run_threaded

JITTERS = (
    ("brightness", colour.adjust_brightness),
    ("contrast", colour.adjust_contrast),
    ("saturation", colour.adjust_saturation),
    ("hue", colour.adjust_hue),
)
CACHED_VALUES = 2**19  # on a CPU, work on as many values at a time as its cache holds
GATHERED_PX = 64  # on a CPU, images up to this side are gathered for an operation, larger ones changed where they lie
FACTORS = ("brightness", "contrast", "saturation", "hue", "sigma", "hed_scale", "hed_shift")


class ImageCrops:
    """The views of a tile: crop, resize, flip, turn, stain jitter, colour jitter, grey, blur, solarize, normalise.

    Attributes:
        groups: How many views each group has; consecutive views of one size form a group, such as ``[2, 8]``.
    """

    def __init__(self, views: Sequence[ViewRecipe], mean: Sequence[float], std: Sequence[float]) -> None:
        """Keep what does not change from batch to batch.

        Args:
            views: One recipe per view; the two that the teacher sees come first.
            mean: Mean of each channel, of values in [0, 1].
            std: Standard deviation of each channel.
        """
        self.views = list(views)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._drawer = ViewDrawer(self.views)
        runs = [(size, len(list(run))) for size, run in groupby(view.size for view in self.views)]
        self.sizes = [size for size, _ in runs]
        self.groups = [count for _, count in runs]

    def draw(
        self, shape: tuple[int, int], tissue: np.ndarray | None, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Draw the parameters of all views of one tile.

        Args:
            shape: Height and width of the tile in px, without padding.
            tissue: Ignored: a tile is all tissue.
            rng: Where the numbers come from.

        Returns:
            One array per parameter with leading dim V (see :func:`dino.crops.parameters.draw_view`).
        """
        return self._drawer(*shape, rng)

    @torch.no_grad()
    def apply(self, pixels: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
        """Make the views of a batch. A sample's views do not depend on the rest of its batch.

        Args:
            pixels: (B, 3, H, W) uint8; tiles of unequal size are padded at the bottom and right, which is never read.
            parameters: What :meth:`draw` gave, stacked to (B, V, ...), on the CPU: which samples an operation
                concerns is decided there, so that the host never waits for the device.

        Returns:
            One (V_g, B, 3, s, s) float32 tensor per group, normalised, on the device of ``pixels``.
        """
        if pixels.device.type != "cpu":
            return self._make(pixels, parameters)
        batch = len(pixels)
        views = [torch.empty(count, batch, 3, size, size) for size, count in zip(self.sizes, self.groups, strict=True)]

        def work(start: int) -> None:
            part = slice(start, start + share)
            made = self._make(pixels[part], {name: value[part] for name, value in parameters.items()})
            for group, some in zip(views, made, strict=True):
                group[:, part] = some

        share = max(1, CACHED_VALUES // sum(group[:, :1].numel() for group in views)) if batch else 1
        share = min(share, math.ceil(batch / torch.get_num_threads())) or 1
        run_threaded(work, range(0, batch, share))
        return views

    def _make(self, pixels: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
        """What :meth:`apply` does, on the whole batch at once."""
        resize = resize_boxed if pixels.device.type == "cpu" else resize_dense
        result = []
        first = 0
        with torch.autocast(pixels.device.type, enabled=False):  # bf16 would cost two grey levels
            for size, count in zip(self.sizes, self.groups, strict=True):
                group = {k: v[:, first : first + count].transpose(0, 1) for k, v in parameters.items()}  # (V_g, B, ..)
                flip_x, flip_y, transpose = fold_turns(group["flip_x"], group["flip_y"], group["turns"])
                result.append(resize(pixels, group["box"], flip_x, flip_y, transpose, size))  # (V_g, B, 3, s, s)
                self._recolour(result[-1].flatten(0, 1), {k: v.flatten(0, 1) for k, v in group.items()})
                first += count
        return result

    def _recolour(self, images: Tensor, drawn: dict[str, Tensor]) -> None:
        """All that follows the geometry, in place on (n, 3, s, s) values from 0 to 255."""
        images.div_(255).clamp_(0, 1)  # bicubic overshoots
        batch = _Batch(images, drawn)
        batch.update((drawn["hed_scale"].numpy() != 1).any(-1), colour.hed_jitter, "hed_scale", "hed_shift")
        jitter = drawn["jitter_order"].numpy()
        orders = np.where(jitter[:, None] < 0, -1, JITTER_ORDERS[jitter])  # (n, 4)
        for turn in range(len(JITTERS)):
            for index, (name, operation) in enumerate(JITTERS):
                batch.update(orders[:, turn] == index, operation, name)
        batch.update(drawn["grayscale"].numpy(), colour.grayscale)
        size = images.shape[-1]
        radius = blur_radius(max(view.blur_sigma[1] for view in self.views if view.size == size), size)
        batch.update(drawn["sigma"].numpy() > 0, lambda x, sigma: gaussian_blur(x, sigma, radius), "sigma")
        batch.update(drawn["solarize"].numpy(), colour.solarize)
        mean, std = colour.constant((self.mean, self.std), images.device)[:, :, None, None]
        images.sub_(mean).div_(std)


class _Batch:
    """Images, changed in place, with the factors of every operation on their device."""

    def __init__(self, images: Tensor, drawn: dict[str, Tensor]) -> None:
        self.images = images
        # All factors cross to the device in one copy.
        columns = torch.cat([drawn[name].reshape(len(images), -1) for name in FACTORS], dim=1)
        widths = [drawn[name][0].numel() for name in FACTORS]
        factors = to_device(columns, images.device).split(widths, 1)
        self.factors = {
            name: f[:, 0] if width == 1 else f for name, f, width in zip(FACTORS, factors, widths, strict=True)
        }

    @cached_property
    def each(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Every image with its factors, as batches of one."""
        factors = {name: factor.split(1) for name, factor in self.factors.items()}
        return [(image, {n: f[row] for n, f in factors.items()}) for row, image in enumerate(self.images.split(1))]

    def update(self, chosen: np.ndarray, operation: Callable[..., Tensor], *names: str) -> None:
        """Run an operation on the chosen images, given their factors ``names``."""
        if chosen.any():
            large = self.images.device.type == "cpu" and self.images.shape[-1] > GATHERED_PX
            run = self._one_by_one if large else self._together
            run(chosen, operation, names)

    def _together(self, chosen: np.ndarray, operation: Callable[..., Tensor], names: Sequence[str]) -> None:
        if chosen.all():
            operation(self.images, *(self.factors[name] for name in names))
            return
        where = to_device(torch.from_numpy(chosen.nonzero()[0]), self.images.device)
        self.images[where] = operation(self.images[where], *(self.factors[name][where] for name in names))

    def _one_by_one(self, chosen: np.ndarray, operation: Callable[..., Tensor], names: Sequence[str]) -> None:
        """Each image where it lies: gathering the chosen ones takes a CPU longer than most operations."""
        for row in chosen.nonzero()[0].tolist():
            image, factors = self.each[row]
            operation(image, *(factors[name] for name in names))
