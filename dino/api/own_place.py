"""Judging tile features without labels: does a tile, read a little differently, find its own place again?"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import distributed, progress, randomness
from dino.crops.colour import hed_jitter
from dino.errors import ConfigError
from dino.evaluate.retrieval import own_place_accuracy, pixel_features
from dino.extraction.embed import Normalise, embed, normaliser
from dino.models.weights import LoadedBackbone
from dino.slides.reader import SlideReader
from dino.slides.tables import TileRecord, read_status, read_tiles, read_tiling

SHIFT = 0.25  # of a tile's side: 64 of 256 px
STAIN = 0.05  # scale in 1 +- this, shift in +- this, as in the pathology recipe
BATCH = 32


@dataclass(frozen=True)
class OwnPlace:
    """Shares of tiles that find their own place.

    Attributes:
        tiles: How many tiles there are to choose from.
        teacher: Share found by the trained teacher's features.
        untrained: By those of the network before training.
        pixels: By 8 x 8 pixels less their mean.
    """

    tiles: int
    teacher: float
    untrained: float
    pixels: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def measure_own_place(
    root: Path, trained: LoadedBackbone, untrained: LoadedBackbone, *, device: str = "auto", seed: int = 0,
    limit: int = 1000,
) -> OwnPlace:  # fmt: skip
    """Read every tile twice, the second time shifted, turned and restained, and look for it by its features.

    Only tiles of the lattice that do not overlap take part: else the right answer would be ambiguous.

    Args:
        root: ROOT of `dino tile`, whose slides are at hand.
        trained: The teacher.
        untrained: The same network before training.
        device: auto, cpu, cuda or cuda:N.
        seed: Seed of the stain jitter, and of the choice where there are too many tiles.
        limit: Most tiles that take part.

    Returns:
        The shares.

    Raises:
        DataError: If ROOT or its slides cannot be read.
    """
    tiles = cells_only(read_tiles(root))
    if len(tiles) > limit:
        chosen = randomness.generator(seed, 0, "own place: which").permutation(len(tiles))[:limit]
        tiles = [tiles[i] for i in sorted(chosen)]
    pairs = list(_read_pairs(root, tiles, seed))
    reference, query = (torch.stack(side) for side in zip(*pairs, strict=True))  # (N, 3, S, S)
    where = distributed.choose_device(device)

    def features(loaded: LoadedBackbone, pixels: Tensor) -> Tensor:
        return embed(loaded.backbone, pixels.split(BATCH), tile_normaliser(loaded), where, "fp32")

    return OwnPlace(
        tiles=len(tiles),
        teacher=own_place_accuracy(features(trained, query), features(trained, reference)),
        untrained=own_place_accuracy(features(untrained, query), features(untrained, reference)),
        pixels=own_place_accuracy(pixel_features(query), pixel_features(reference)),
    )


def tile_normaliser(loaded: LoadedBackbone) -> Normalise:
    """From 8-bit tiles to what a patch-level backbone takes.

    Raises:
        ConfigError: If it is a region-level one.
    """
    transform = loaded.transform
    if transform is None:
        raise ConfigError(f"expected a patch-level model, found the region-level {loaded.source}; swap the two")
    return normaliser(transform.mean, transform.std, loaded.backbone.spec.patch_size)


def cells_only(tiles: list[TileRecord]) -> list[TileRecord]:
    """The tiles that lie on the lattice itself, so that none overlaps another."""
    return [tile for tile in tiles if tile.on_lattice]


def second_reading(pixels: np.ndarray, rng: np.random.Generator) -> Tensor:
    """A tile turned by a quarter and restained.

    Args:
        pixels: uint8, (S, S, 3).
        rng: Where the stain's numbers come from.

    Returns:
        uint8, (3, S, S).
    """
    turned = torch.from_numpy(np.rot90(pixels).copy()).permute(2, 0, 1)[None].float() / 255  # (1, 3, S, S)
    drawn = torch.from_numpy(rng.uniform(-STAIN, STAIN, (2, 1, 3)).astype(np.float32))
    return (hed_jitter(turned, 1 + drawn[0], drawn[1])[0] * 255).round().to(torch.uint8)


def _read_pairs(root: Path, tiles: list[TileRecord], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    status, tiling = read_status(root), read_tiling(root)
    with progress.bar("own place", len(tiles)) as bar:
        for slide in dict.fromkeys(tile.slide_id for tile in tiles):
            row = status[slide]
            with SlideReader(row.image_path, tiling.geometry, spacing_at_level_0=row.spacing_um) as reader:
                for index, tile in ((i, t) for i, t in enumerate(tiles) if t.slide_id == slide):
                    shift = math.floor(SHIFT * tile.step_lv0)
                    width, height = reader.lattice.slide_size
                    # Towards the inside of the slide, so that the second reading is whole.
                    x = tile.x + (shift if tile.x + tile.step_lv0 + shift <= width else -shift)
                    y = tile.y + (shift if tile.y + tile.step_lv0 + shift <= height else -shift)
                    rng = randomness.generator(seed, index, "own place: stain")
                    first = torch.from_numpy(reader.read_cell(tile.x, tile.y).copy()).permute(2, 0, 1)
                    yield first, second_reading(reader.read_cell(x, y), rng)
                    bar.advance()
