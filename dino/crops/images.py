"""Crops of tiles: parameters are drawn by a data worker and applied to the batch on the training device."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino.config.schema import ObjectiveConfig, PatchAugConfig
from dino.crops import colour
from dino.crops.masks import MaskDrawer
from dino.crops.memory import MemoryPool
from dino.crops.parameters import JITTER_ORDERS, ViewDrawer
from dino.crops.resample import fold_rotation, resize_boxed, resize_dense, resize_one, to_device
from dino.environment import run_threaded

JITTERS = (
    ("brightness", colour.adjust_brightness),
    ("contrast", colour.adjust_contrast),
    ("saturation", colour.adjust_saturation),
    ("hue", colour.adjust_hue),
)
CACHED_VALUES = 2**19  # on a CPU, number of values that are processed at a time: they fit into its cache
GATHERED_PX = 64  # on a CPU, images up to this size are processed in batches, larger ones one by one
FACTORS = ("brightness", "contrast", "saturation", "hue", "sigma", "hed_scale", "hed_shift")


class Operation(NamedTuple):
    """One operation of a batch.

    Attributes:
        chosen: (n,) bool, the images that it applies to.
        function: Overwrites the images.
        names: Names of the factors that it takes.
    """

    chosen: np.ndarray
    function: Callable[..., Tensor]
    names: Sequence[str] = ()


class ImageCrops:
    """The views of a tile: crop, resize, flip, rotate, stain jitter, colour jitter, grey, blur, solarize, normalise.

    Attributes:
        view_sizes: Side of each view in px; the two that the teacher sees come first.
        groups: Number of views in each group; consecutive views of one size and picture form a group: ``[2, 8]``.
        sizes: Side of each group's views in px.
        pictures: Which of a sample's pictures each group's views are cut from.
    """

    def __init__(self, aug: PatchAugConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        """Prepare the parts that are the same for every batch.

        Args:
            aug: Crops and augmentations.
            mean: Mean of each channel, of values in [0, 1].
            std: Standard deviation of each channel.

        Raises:
            ConfigError: If a setting is out of its range.
        """
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._drawer = ViewDrawer(aug)
        self._largest_sigma = aug.blur_sigma[1]
        self._memory = MemoryPool()
        self.view_sizes = self._drawer.sizes
        views = zip(self.view_sizes, self._drawer.pictures, strict=True)
        runs = [(*kind, len(list(run))) for kind, run in groupby(views)]
        self.sizes, self.pictures, self.groups = map(list, zip(*runs, strict=True))

    def draw(
        self, shape: tuple[int, int], tissue: np.ndarray | None, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Draw the parameters of all views of one tile.

        Args:
            shape: Height and width of the tile in px, without padding.
            tissue: Ignored; used for feature grids only.
            rng: Random number generator.

        Returns:
            One array per parameter with leading dim V (see :class:`dino.crops.parameters.ViewDrawer`).
        """
        return self._drawer(*shape, rng)

    def masks(self, settings: ObjectiveConfig, patch_size: int) -> MaskDrawer:
        """What draws the masks of the global views.

        Raises:
            ConfigError: If a setting is out of its range.
        """
        side = self.sizes[0] // patch_size
        return MaskDrawer(settings, (side, side))

    @torch.no_grad()
    def apply(self, pixels: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
        """Compute the views of a batch. The views of a sample do not depend on the other samples of the batch.

        Args:
            pixels: (B, 3, H, W) uint8; tiles of unequal size are padded at the bottom and right; padding is not read.
                (B, P, 3, H, W) where a sample has pictures of P spacings.
            parameters: Results of :meth:`draw`, stacked to (B, V, ...), on the CPU: the images of each operation are
                selected there, to avoid synchronising with the device.

        Returns:
            One (V_g, B, 3, s, s) float32 tensor per group, normalised, on the device of ``pixels``.
        """
        result, first = [], 0
        with torch.autocast(pixels.device.type, enabled=False):  # bf16 would round by two grey levels
            for size, count, picture in zip(self.sizes, self.groups, self.pictures, strict=True):
                group = {k: v[:, first : first + count].transpose(0, 1) for k, v in parameters.items()}  # (V_g, B, ..)
                make = self._make_on_cpu if pixels.device.type == "cpu" else self._make
                result.append(make(pixels if pixels.ndim == 4 else pixels[:, picture], group, size))
                first += count
        return result

    def _make(self, pixels: Tensor, group: dict[str, Tensor], size: int) -> Tensor:
        """The views of one size, (V_g, B, 3, s, s), with one call per operation for all images that it applies to."""
        resize = resize_boxed if pixels.device.type == "cpu" else resize_dense
        views = resize(pixels, group["box"], *_folded(group), size)
        drawn = {k: v.flatten(0, 1) for k, v in group.items()}
        images, factors = views.flatten(0, 1), _factors(drawn, pixels.device)
        for chosen, function, names in self._operations(drawn, size):
            if chosen.all():
                function(images, *(factors[name] for name in names))
            elif chosen.any():
                where = to_device(torch.from_numpy(chosen.nonzero()[0]), images.device)
                images[where] = function(images[where], *(factors[name][where] for name in names))
        return views

    def _make_on_cpu(self, pixels: Tensor, group: dict[str, Tensor], size: int) -> Tensor:
        """Same as :meth:`_make`, but with a few images at a time on each core, so that they stay in its cache."""
        views = self._memory.empty((len(group["box"]), len(pixels), 3, size, size), torch.float32)
        if size > GATHERED_PX:
            run_threaded(self._tile_maker(pixels, group, views), range(len(pixels)))
            return views
        chunk = max(1, CACHED_VALUES // views[:, :1].numel()) if len(pixels) else 1
        chunk = min(chunk, math.ceil(len(pixels) / torch.get_num_threads())) or 1

        def work(start: int) -> None:
            part = slice(start, start + chunk)
            views[:, part] = self._make(pixels[part], {k: v[:, part] for k, v in group.items()}, size)

        run_threaded(work, range(0, len(pixels), chunk))
        return views

    def _tile_maker(self, pixels: Tensor, group: dict[str, Tensor], views: Tensor) -> Callable[[int], None]:
        """A function that computes the views of one tile in place, image by image."""
        drawn = {k: v.flatten(0, 1) for k, v in group.items()}
        boxes, flags = drawn["box"].tolist(), torch.stack(_folded(drawn), dim=-1).tolist()
        operations = [(operation, operation.chosen.tolist()) for operation in self._operations(drawn, views.shape[-1])]
        factors = {name: factor.split(1) for name, factor in _factors(drawn, pixels.device).items()}
        images = views.flatten(0, 1).split(1)

        def work(tile: int) -> None:
            for row in range(tile, len(images), len(pixels)):  # one view after another
                images[row][0] = resize_one(pixels[tile], boxes[row], flags[row], views.shape[-1])
                for operation, chosen in operations:
                    if chosen[row]:
                        operation.function(images[row], *(factors[name][row] for name in operation.names))

        return work

    def _operations(self, drawn: dict[str, Tensor], size: int) -> Iterator[Operation]:
        """The operations on images of one size, in order."""
        all_images = np.ones(len(drawn["sigma"]), bool)
        yield Operation(all_images, _to_unit)
        yield Operation((drawn["hed_scale"].numpy() != 1).any(-1), colour.hed_jitter, ("hed_scale", "hed_shift"))
        jitter = drawn["jitter_order"].numpy()
        orders = np.where(jitter[:, None] < 0, -1, JITTER_ORDERS[jitter])  # (n, 4)
        for position in range(len(JITTERS)):
            for index, (name, function) in enumerate(JITTERS):
                yield Operation(orders[:, position] == index, function, (name,))
        yield Operation(drawn["grayscale"].numpy(), colour.grayscale)
        radius = colour.blur_radius(self._largest_sigma, size)
        yield Operation(drawn["sigma"].numpy() > 0, lambda x, sigma: colour.gaussian_blur(x, sigma, radius), ("sigma",))
        yield Operation(drawn["solarize"].numpy(), colour.solarize)
        yield Operation(all_images, self._normalise)

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = colour.constant((self.mean, self.std), images.device)[:, :, None, None]
        return images.sub_(mean).div_(std)


def _to_unit(images: Tensor) -> Tensor:
    return images.div_(255).clamp_(0, 1)  # bicubic interpolation overshoots


def _factors(drawn: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The factors of every operation, (n,) or (n, 3), on the device, transferred in one copy."""
    columns = [drawn[name].reshape(len(drawn[name]), -1) for name in FACTORS]
    moved = to_device(torch.cat(columns, dim=1), device).split([column.shape[1] for column in columns], dim=1)
    return {name: f[:, 0] if f.shape[1] == 1 else f for name, f in zip(FACTORS, moved, strict=True)}


def _folded(drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return fold_rotation(drawn["flip_x"], drawn["flip_y"], drawn["turns"])
