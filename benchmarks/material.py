"""Data of the benchmarks: tiles of the package's sample slide as JPEG files, feature grids as ``.pt`` files."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino.config.schema import PatchAugConfig
from dino.crops.images import ImageCrops
from dino.models.transforms import TRANSFORMS
from dino.slides import sample_slide

TILE_PX = 256
STRIDE_PX = 96  # neighbouring tiles overlap: the sample slide is small
JPEG_QUALITY = 90  # as `dino tile` writes them
GRID_SIDE, GRID_DIM = 16, 384
IMAGENET = TRANSFORMS["imagenet"]


@cache
def _slide_pixels() -> np.ndarray:
    with Image.open(sample_slide()) as image:  # Pillow reads its only level as a TIFF, without openslide
        return np.asarray(image.convert("RGB"))


def tile_origins(count: int) -> list[tuple[int, int]]:
    """``(x, y)`` of ``count`` tiles of the sample slide; repeated if there are more than fit."""
    height, width = _slide_pixels().shape[:2]
    rows, columns = range(0, height - TILE_PX, STRIDE_PX), range(0, width - TILE_PX, STRIDE_PX)
    places = [(x, y) for y in rows for x in columns]
    return [places[i * 7 % len(places)] for i in range(count)]


def tiles(count: int) -> Tensor:
    """(count, 3, 256, 256) uint8 tiles of the sample slide."""
    pixels = _slide_pixels()
    cut = [pixels[y : y + TILE_PX, x : x + TILE_PX] for x, y in tile_origins(count)]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).contiguous()


def tile_files(folder: Path, count: int) -> list[Path]:
    """``count`` tiles as JPEG files under ``folder``; existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"sample_{index}_0.jpg" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    pixels = _slide_pixels()
    for index in missing:
        x, y = tile_origins(count)[index]
        Image.fromarray(pixels[y : y + TILE_PX, x : x + TILE_PX]).save(paths[index], quality=JPEG_QUALITY)
    return paths


def grid_files(folder: Path, count: int) -> list[Path]:
    """``count`` feature grids of 16 x 16 cells of 384 numbers, one file each, as `dino extract` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"sample_{index}_0.pt" for index in range(count)]
    for path in paths:
        if not path.exists():
            torch.save(torch.randn(GRID_SIDE**2, GRID_DIM, generator=generator), path)
    return paths


def original_crops(sizes: tuple[int, int] = (224, 96), local_number: int = 8) -> ImageCrops:
    """The original's two global and eight local views (its augmentations are the schema's defaults)."""
    large, small = sizes
    aug = PatchAugConfig(global_crops_size=large, local_crops_size=small, local_crops_number=local_number)
    return ImageCrops(aug, IMAGENET.mean, IMAGENET.std)


def random_views(batch: int, channels: int, groups: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """Views of random numbers: one (V_g, B, C, s, s) tensor for each ``(count, size)``."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, batch, channels, s, s, generator=generator).to(device) for n, s in groups]
