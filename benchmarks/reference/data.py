"""Samples one by one, as a plain DataLoader takes them: every crop made in the worker, and sent across as floats."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.reference.crops import Drawn, PillowCrops
from dino import randomness

Draw = Callable[[tuple[int, int], np.ndarray | None, np.random.Generator], Drawn]


class TileViews(Dataset):
    """The views of a tile, decoded and cropped by Pillow.

    Args:
        paths: Image files.
        crops: Makes the views.
        draw: Draws their parameters.
        seed: Seed of the drawing.
    """

    def __init__(self, paths: Sequence[Path], crops: PillowCrops, draw: Draw, seed: int = 0) -> None:
        self.paths, self.crops, self.draw, self.seed = list(paths), crops, draw, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = Image.open(self.paths[index]).convert("RGB")
        rng = randomness.generator(self.seed, index, "crops")
        return self.crops(image, self.draw((image.height, image.width), None, rng))


class GridViews(Dataset):
    """The views of a feature grid: the file read whole, its crops cut out one by one.

    Args:
        paths: ``.pt`` files of [cells x D].
        side: Side of the grids.
        draw: Draws the crops.
        seed: Seed of the drawing.
    """

    def __init__(self, paths: Sequence[Path], side: int, draw: Draw, seed: int = 0) -> None:
        self.paths, self.side, self.draw, self.seed = list(paths), side, draw, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        rows = torch.load(self.paths[index], weights_only=True)
        grid = rows.unflatten(0, (self.side, self.side)).permute(2, 0, 1)  # (D, h, w)
        drawn = self.draw((self.side, self.side), None, randomness.generator(self.seed, index, "crops"))
        return [_cut(grid, drawn, view) for view in range(len(drawn["box"]))]


def _cut(grid: Tensor, drawn: Drawn, view: int) -> Tensor:
    top, left, height, width = drawn["box"][view]
    crop = grid[:, top : top + height, left : left + width]
    crop = crop.flip(-1) if drawn["flip_x"][view] else crop
    return crop.flip(-2) if drawn["flip_y"][view] else crop


class WholeTiles(Dataset):
    """Tiles for feature extraction through torchvision v2.

    Args:
        items: Image files, or whatever ``read`` takes.
        read: Reads one item to an RGB image.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    def __init__(
        self, items: Sequence[Any], read: Callable[[Any], Image.Image], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.items, self.read = list(items), read
        steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.read(self.items[index])).as_subclass(Tensor)


def open_rgb(path: Path) -> Image.Image:
    """An image file as RGB."""
    return Image.open(path).convert("RGB")


def loader(data: Dataset, batch: int, workers: int) -> DataLoader:
    """Torch's loader with workers that stay between passes, in the order of the data."""
    return DataLoader(data, batch, num_workers=workers, persistent_workers=workers > 0, drop_last=False)
