"""Evaluation of tile features without labels: is the nearest neighbour of a tile its own shifted and restained copy?"""

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
from dino.evaluate.retrieval import pixel_features, self_retrieval_accuracy
from dino.extraction.embed import Normalise, embed, normaliser
from dino.models.weights import LoadedBackbone
from dino.slides.reader import SlideReader
from dino.slides.tables import TileRecord, read_status, read_tiles, read_tiling

SHIFT = 0.25  # of the tile size: 64 of 256 px
STAIN = 0.05  # scale in 1 +- this, shift in +- this, as in the pathology recipe
BATCH = 32


@dataclass(frozen=True)
class SelfRetrieval:
    """Self-retrieval accuracies: fractions of tiles whose nearest neighbour is their own augmented copy.

    Attributes:
        tiles: Number of tiles, of which each is compared with all.
        teacher: Accuracy of the features of the trained teacher.
        untrained: Of those of the network before training.
        pixels: Of 8 x 8 pixels less their mean.
    """

    tiles: int
    teacher: float
    untrained: float
    pixels: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def measure_self_retrieval(
    root: Path, trained: LoadedBackbone, untrained: LoadedBackbone, *, device: str = "auto", seed: int = 0,
    limit: int = 1000,
) -> SelfRetrieval:  # fmt: skip
    """Read every tile twice, the second time shifted, rotated and restained, and retrieve it by its features.

    Only tiles that do not overlap are used, because others would be correct answers too.

    Args:
        root: ROOT of `dino tile`, with its slides.
        trained: The teacher.
        untrained: The same network before training.
        device: auto, cpu, cuda or cuda:N.
        seed: Seed of the stain jitter, and of the choice of tiles if there are more than ``limit``.
        limit: Maximum number of tiles.

    Returns:
        The accuracies.

    Raises:
        DataError: If ROOT or its slides cannot be read.
    """
    tiles = cells_only(read_tiles(root))
    if len(tiles) > limit:
        chosen = randomness.generator(seed, 0, "own place: which").permutation(len(tiles))[:limit]
        tiles = [tiles[i] for i in sorted(chosen)]
    pairs = list(_read_pairs(root, tiles, seed))
    reference, query = (torch.stack(side) for side in zip(*pairs, strict=True))  # (N, 3, S, S)
    chosen_device = distributed.choose_device(device)

    def features(loaded: LoadedBackbone, pixels: Tensor) -> Tensor:
        return embed(loaded.backbone, pixels.split(BATCH), _normaliser(loaded), chosen_device, "fp32")

    return SelfRetrieval(
        tiles=len(tiles),
        teacher=self_retrieval_accuracy(features(trained, query), features(trained, reference)),
        untrained=self_retrieval_accuracy(features(untrained, query), features(untrained, reference)),
        pixels=self_retrieval_accuracy(pixel_features(query), pixel_features(reference)),
    )


def cells_only(tiles: list[TileRecord]) -> list[TileRecord]:
    """The tiles on the lattice itself, which do not overlap."""
    return [tile for tile in tiles if tile.on_lattice]


def second_reading(pixels: np.ndarray, rng: np.random.Generator) -> Tensor:
    """A tile rotated by 90° and restained.

    Args:
        pixels: uint8, (S, S, 3).
        rng: Generator of the stain jitter.

    Returns:
        uint8, (3, S, S).
    """
    turned = torch.from_numpy(np.rot90(pixels).copy()).permute(2, 0, 1)[None].float() / 255  # (1, 3, S, S)
    drawn = torch.from_numpy(rng.uniform(-STAIN, STAIN, (2, 1, 3)).astype(np.float32))
    return (hed_jitter(turned, 1 + drawn[0], drawn[1])[0] * 255).round().to(torch.uint8)


def _normaliser(loaded: LoadedBackbone) -> Normalise:
    transform = loaded.transform
    if transform is None:
        raise ConfigError(f"expected a patch-level model, found the region-level {loaded.source}; swap the two")
    return normaliser(transform.mean, transform.std, loaded.backbone.spec.patch_size)


def _read_pairs(root: Path, tiles: list[TileRecord], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    status, tiling = read_status(root), read_tiling(root)
    with progress.bar("self-retrieval", len(tiles)) as bar:
        for slide in dict.fromkeys(tile.slide_id for tile in tiles):
            row = status[slide]
            with SlideReader(row.image_path, tiling.geometry, row.spacing_um, reader=tiling.reader) as reader:
                for index, tile in ((i, t) for i, t in enumerate(tiles) if t.slide_id == slide):
                    shift = math.floor(SHIFT * tile.step_lv0)
                    width, height = reader.lattice.slide_size
                    # Towards the inside of the slide, so that the second tile is inside it too.
                    x = tile.x + (shift if tile.x + tile.step_lv0 + shift <= width else -shift)
                    y = tile.y + (shift if tile.y + tile.step_lv0 + shift <= height else -shift)
                    rng = randomness.generator(seed, index, "own place: stain")
                    first = torch.from_numpy(reader.read_cell(tile.x, tile.y).copy()).permute(2, 0, 1)
                    yield first, second_reading(reader.read_cell(x, y), rng)
                    bar.advance()
