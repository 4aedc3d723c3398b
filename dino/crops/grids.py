"""Crops of feature grids (level 2): cells are copied, never resampled."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino.config.schema import ObjectiveConfig, RegionAugConfig
from dino.crops.masks import MaskDrawer
from dino.crops.memory import MemoryPool
from dino.crops.parameters import GLOBAL_VIEWS, check_range
from dino.crops.resample import fold_rotation, to_device
from dino.errors import ConfigError, DataError

CELL_TISSUE = 0.25  # minimum tissue fraction of a cell with tissue: the default of `dino tile` for tiles
SMALLEST_GRID = 4


def crop_side(cells: int, scale: float, minimum: int, maximum: int) -> int:
    """Side of a crop in cells: ``round(scale * cells)``, clamped to ``minimum .. maximum``.

    Args:
        cells: Side of the grid.
        scale: Side of the crop as a fraction of the grid's.
        minimum: Minimum side.
        maximum: Maximum side.

    Returns:
        The side, in cells.
    """
    return min(max(round(scale * cells), minimum), maximum)


def check_region_aug(aug: RegionAugConfig) -> None:
    """Check every range of level 2's augmentations.

    Raises:
        ConfigError: If a fraction, probability or count is out of its range.
    """
    for name in ("global_crops_scale", "local_crops_scale"):
        if not 0 < getattr(aug, name) <= 1:
            raise ConfigError(
                f"expected aug.{name} above 0 and at most 1, found {getattr(aug, name)}; set a value in this range"
            )
    check_range(aug, ("horizontal_flip", "vertical_flip", "min_tissue"), 0, 1)
    check_range(aug, ("local_crops_number", "redraws"), 0)


class GridCrops:
    """The views of a feature grid: two global crops, then local ones, flipped and rotated.

    Attributes:
        groups: ``[2, local_number]``, or ``[2]`` without local crops.
        sizes: Height and width in cells of each group's crops.
    """

    def __init__(
        self, grid_size: tuple[int, int], aug: RegionAugConfig | None = None, cells: Tensor | None = None
    ) -> None:
        """Compute the sizes of the crops.

        Args:
            grid_size: Height and width of the grids, in cells.
            aug: Crops and augmentations; the defaults when None.
            cells: (n, h * w, D) cells of all grids, memory-mapped or on the training device: batches then contain only
                row numbers. None if batches contain the cells.

        Raises:
            ConfigError: If the grid has fewer than 4 cells along an axis, or a setting is out of its range.
        """
        if min(grid_size) < SMALLEST_GRID:
            raise ConfigError(
                f"a grid needs at least {SMALLEST_GRID} x {SMALLEST_GRID} cells to be cropped, found "
                f"{grid_size[0]} x {grid_size[1]}: extract larger regions"
            )
        self.grid_size, self.cells = grid_size, cells
        self._memory = MemoryPool()
        self.aug = aug or RegionAugConfig()
        check_region_aug(self.aug)
        turn_step = 1 if grid_size[0] == grid_size[1] else 2
        self.turn_step = turn_step if self.aug.quarter_turns else 0
        large = tuple(crop_side(n, self.aug.global_crops_scale, 2, n - 1) for n in grid_size)
        small = tuple(crop_side(n, self.aug.local_crops_scale, 2, n) for n in grid_size)
        self.groups = [GLOBAL_VIEWS] + [self.aug.local_crops_number] * (self.aug.local_crops_number > 0)
        self.sizes = [large, small][: len(self.groups)]
        self._sides = np.repeat(self.sizes, self.groups, axis=0)  # (V, 2)
        views = len(self._sides)
        self._probabilities = np.repeat([self.aug.horizontal_flip, self.aug.vertical_flip], views)  # (2V,)
        turns = [4 // self.turn_step if self.turn_step else 1] * views
        self._candidates = GLOBAL_VIEWS * (1 + self.aug.redraws)
        corners = np.repeat(self.sizes, [self._candidates, *self.groups[1:]], axis=0)  # (candidates + local views, 2)
        self._counts = np.concatenate(
            [turns, (np.add(grid_size, 1) - corners).flatten()]
        )  # number of values of each integer

    def __getstate__(self) -> dict[str, Any]:
        """Without the cells: worker processes only draw."""
        return {**self.__dict__, "cells": None}

    def draw(
        self, shape: tuple[int, int], tissue: np.ndarray | None, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Draw the parameters of all views of one grid.

        A global crop is redrawn until enough of its cells contain tissue; if no draw has enough, the one with the
        most is used. A cell contains tissue if its tissue fraction is at least 0.25, at which `dino tile` keeps a tile
        by default.

        Args:
            shape: Height and width of the grid in cells.
            tissue: (h, w) tissue fraction of each cell; None if unknown, in which case crops are not redrawn.
            rng: Random number generator.

        Returns:
            ``box`` (V, 4) int64: top, left, height, width in cells; ``flip_x``, ``flip_y`` (V,) bool; ``turns`` (V,)
            int64, counter-clockwise rotation in units of 90°.

        Raises:
            DataError: If the size of the grid is not ``grid_size``.
        """
        if tuple(shape) != tuple(self.grid_size):
            raise DataError(
                f"expected grids of {self.grid_size[0]} x {self.grid_size[1]} cells, found {shape[0]} x {shape[1]}: "
                "train on regions of one size"
            )
        # One call for all random numbers of a sample, because the overhead of a call is larger than their cost.
        views, flips = len(self._sides), len(self._probabilities)
        numbers = rng.random(flips + len(self._counts))
        flip_x, flip_y = (numbers[:flips] < self._probabilities).reshape(2, views)
        integers = (numbers[flips:] * self._counts).astype(np.int64)
        corners = integers[views:].reshape(-1, 2)
        candidates = corners[: self._candidates].reshape(GLOBAL_VIEWS, -1, 2)
        box = np.empty((views, 4), np.int64)
        box[:, 2:] = self._sides
        box[:GLOBAL_VIEWS, :2] = candidates[:, 0] if tissue is None else self._with_tissue(candidates, tissue)
        box[GLOBAL_VIEWS:, :2] = corners[self._candidates :]
        return {"box": box, "flip_x": flip_x, "flip_y": flip_y, "turns": integers[:views] * self.turn_step}

    def _with_tissue(self, candidates: np.ndarray, tissue: np.ndarray) -> list[np.ndarray]:
        """The first of each view's candidate corners (V, n, 2) with enough tissue, else the one with the most."""
        (height, width), chosen = self.sizes[0], []
        for corners in candidates:
            fractions = [(tissue[t : t + height, x : x + width] >= CELL_TISSUE).mean() for t, x in corners]
            enough = [i for i, fraction in enumerate(fractions) if fraction >= self.aug.min_tissue]
            chosen.append(corners[enough[0] if enough else int(np.argmax(fractions))])
        return chosen

    def masks(self, settings: ObjectiveConfig, patch_size: int) -> MaskDrawer:
        """What draws the masks of the global views: of cells with tissue, each of which is a token.

        Raises:
            ConfigError: If a setting is out of its range.
        """
        return MaskDrawer(settings, (self.sizes[0][0], self.sizes[0][1]), self.tissue_cells)

    def tissue_cells(self, parameters: Mapping[str, np.ndarray], tissue: np.ndarray | None) -> np.ndarray | None:
        """Which cells of the global views contain tissue.

        Args:
            parameters: What :meth:`draw` returned.
            tissue: (h, w) tissue fraction of each cell; None if unknown.

        Returns:
            (G, s_h, s_w) bool; None if unknown.
        """
        if tissue is None:
            return None
        views = []
        names = ("box", "flip_x", "flip_y", "turns")
        for box, flip_x, flip_y, turns in zip(*(parameters[name][:GLOBAL_VIEWS] for name in names), strict=True):
            top, left, height, width = box
            view = tissue[top : top + height, left : left + width] >= CELL_TISSUE
            view = view[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
            views.append(np.rot90(view, turns))
        return np.stack(views)

    @torch.no_grad()
    def apply(self, grids: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
        """Compute the views of a batch: exact copies of cells.

        Args:
            grids: (B, h * w, D) cells, row-major; or (B,) int64, row numbers in ``cells``.
            parameters: Results of :meth:`draw`, stacked to (B, V, ...), on the CPU.

        Returns:
            One (V_g, B, D, s_h, s_w) tensor per group, of the dtype and on the device of the cells; D is the
            innermost dimension in memory, as the region ViT reads it.
        """
        is_rows = grids.ndim == 1
        cells = self.cells if is_rows else grids  # (n, h * w, D)
        if cells is None:
            raise DataError("expected (B, h * w, D) cells, found row numbers; pass `cells` to GridCrops")
        rows = grids if is_rows else torch.arange(len(grids), device=grids.device)
        result = []
        first = 0
        for size, count in zip(self.sizes, self.groups, strict=True):
            group = {k: v[:, first : first + count].transpose(0, 1) for k, v in parameters.items()}  # (V_g, B, ..)
            index = self._cell_index(group, size, rows)  # (V_g, B, s_h, s_w)
            result.append(self._memory.gather(cells.flatten(0, 1), index).movedim(-1, 2))  # (V_g, B, D, s_h, s_w)
            first += count
        return result

    def _cell_index(self, group: dict[str, Tensor], size: Sequence[int], rows: Tensor) -> Tensor:
        """Index of each crop's cells among all n * h * w, (V_g, B, s_h, s_w), on the device of ``rows``."""
        flip_x, flip_y, transpose = fold_rotation(group["flip_x"], group["flip_y"], group["turns"])
        drawn = torch.stack([group["box"][..., 0], group["box"][..., 1], flip_y, flip_x, transpose])  # (5, V_g, B)
        top, left, flip_y, flip_x, transpose = to_device(drawn, rows.device)[..., None]  # each (V_g, B, 1)
        down, across = (torch.arange(s, device=rows.device) for s in size)
        down = top + torch.where(flip_y.bool(), size[0] - 1 - down, down)  # (V_g, B, s_h)
        across = left + torch.where(flip_x.bool(), size[1] - 1 - across, across)  # (V_g, B, s_w)
        down = down + rows[:, None] * self.grid_size[0]  # the grids are stacked vertically
        index = down[..., :, None] * self.grid_size[1] + across[..., None, :]
        if self.turn_step != 1 or size[0] != size[1]:
            return index
        return torch.where(transpose[..., None].bool(), index.transpose(-1, -2), index)
