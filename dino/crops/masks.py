"""Masks of the global views: which tokens of the student are replaced by the mask token."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from dino.config.schema import ObjectiveConfig
from dino.crops.parameters import GLOBAL_VIEWS
from dino.errors import ConfigError

Valid = Callable[[Mapping[str, np.ndarray], np.ndarray | None], np.ndarray | None]

SHAPES = ("blocks", "squares", "random")
ASPECT = (0.3, 1 / 0.3)  # height / width of a block (Bao et al. 2021, BEiT, arXiv 2106.08254, algorithm 1)
SMALLEST_BLOCK = 4  # tokens
ATTEMPTS = 10  # per block
SQUARES = 4  # as in I-JEPA (Assran et al. 2023, arXiv 2301.08243)


class MaskDrawer:
    """Draws the masks of a sample.

    A fraction ``mask_probability`` of the views is masked. The views of one sample are chosen together (systematic
    sampling), so that with a probability of 0.5 exactly one of the two is. The masked fraction of a view's tokens is
    uniform in ``mask_ratio``, and its number of masked tokens is exact: where the blocks do not reach it, single tokens
    complete it.

    Args:
        settings: The shape of the masks, and how many there are.
        size: Height and width of a global view in tokens.
        valid: Returns which tokens may be masked, (G, h, w) bool, from a sample's crop parameters and tissue; None for
            all of them.

    Raises:
        ConfigError: If a setting is out of its range, or a view has too few tokens.
    """

    def __init__(self, settings: ObjectiveConfig, size: tuple[int, int], valid: Valid | None = None) -> None:
        low, high = settings.mask_ratio
        if settings.mask_shape not in SHAPES:
            raise ConfigError(f"expected objective.mask_shape {', '.join(SHAPES)}, found '{settings.mask_shape}'")
        if not 0 < low <= high < 1:
            raise ConfigError(f"expected objective.mask_ratio with 0 < low <= high < 1, found {[low, high]}")
        if not 0 < settings.mask_probability <= 1:
            raise ConfigError(
                f"expected objective.mask_probability above 0 and at most 1, found {settings.mask_probability}"
            )
        if round(low * math.prod(size)) < 1:
            raise ConfigError(
                f"expected objective.mask_ratio to mask at least one token, found {low:g} of {size[0]} x {size[1]} "
                "tokens of a global view: raise it, or use larger global crops"
            )
        self.settings, self.size, self.valid = settings, size, valid

    def __call__(
        self, parameters: Mapping[str, np.ndarray], tissue: np.ndarray | None, rng: np.random.Generator
    ) -> np.ndarray:
        """Draw the masks; the ratio is that of the tokens that may be masked.

        Args:
            parameters: Crop parameters of the sample.
            tissue: Tissue fraction of the cells of a grid, where known.
            rng: Random number generator.

        Returns:
            (G, h * w) bool.
        """
        valid = self.valid(parameters, tissue) if self.valid else None
        settings = self.settings
        masks = np.zeros((GLOBAL_VIEWS, *self.size), bool)
        first, ratios = rng.random(), rng.random(GLOBAL_VIEWS)
        low, high = settings.mask_ratio
        for view, mask in enumerate(masks):
            if (first + view / GLOBAL_VIEWS) % 1 < settings.mask_probability:
                allowed = np.ones(self.size, bool) if valid is None else valid[view]
                count = round((low + (high - low) * ratios[view]) * int(allowed.sum()))
                self._fill(mask, allowed, count, rng)
        return masks.reshape(GLOBAL_VIEWS, -1)

    def _fill(self, mask: np.ndarray, allowed: np.ndarray, count: int, rng: np.random.Generator) -> None:
        """Mask ``count`` of the ``allowed`` tokens, in place."""
        if self.settings.mask_shape == "blocks":
            while (missing := count - int(mask.sum())) >= SMALLEST_BLOCK:
                if not self._add_block(mask, allowed, missing, rng):
                    break
        elif self.settings.mask_shape == "squares":
            side = max(1, round(math.sqrt(count / SQUARES)))
            for _ in range(SQUARES):
                part = self._place(side, side, rng)
                if np.count_nonzero(allowed[part] & ~mask[part]) <= count - int(mask.sum()):
                    mask[part] |= allowed[part]
        free = np.flatnonzero(allowed & ~mask)
        mask.reshape(-1)[rng.permutation(free)[: count - int(mask.sum())]] = True

    def _add_block(self, mask: np.ndarray, allowed: np.ndarray, missing: int, rng: np.random.Generator) -> bool:
        """Mask one more block of at most ``missing`` tokens; False if none of several draws fits."""
        for area, aspect, *corner in rng.random((ATTEMPTS, 4)):
            target = SMALLEST_BLOCK + (missing - SMALLEST_BLOCK) * area
            ratio = math.exp(math.log(ASPECT[0]) + aspect * math.log(ASPECT[1] / ASPECT[0]))
            height, width = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if not (0 < height <= self.size[0] and 0 < width <= self.size[1]):
                continue
            part = self._at(height, width, corner)
            added = np.count_nonzero(allowed[part] & ~mask[part])
            if 0 < added <= missing:
                mask[part] |= allowed[part]
                return True
        return False

    def _place(self, height: int, width: int, rng: np.random.Generator) -> tuple[slice, slice]:
        return self._at(min(height, self.size[0]), min(width, self.size[1]), rng.random(2))

    def _at(self, height: int, width: int, corner: np.ndarray | list[float]) -> tuple[slice, slice]:
        """A block whose corner is at two fractions of the free space."""
        top, left = (int(f * (n - side + 1)) for f, n, side in zip(corner, self.size, (height, width), strict=True))
        return slice(top, top + height), slice(left, left + width)
