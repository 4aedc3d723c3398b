"""Evaluation of tile features without labels: is the nearest neighbour of a tile its own shifted and restained copy?"""

import math
import statistics
from collections.abc import Callable, Iterator
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
TOWARDS = ((1, 1), (-1, -1), (1, -1), (-1, 1))  # directions of the shifts, each with one turn by 90° more
STAIN = 0.05  # scale in 1 +- this, shift in +- this, as in the pathology recipe
BATCH = 32


@dataclass(frozen=True)
class SelfRetrieval:
    """Self-retrieval accuracies: fractions of augmented copies of tiles whose nearest neighbour is their own tile.

    Attributes:
        tiles: Number of tiles, which each copy is compared with.
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
    """Read four copies of every tile, each shifted, rotated and restained otherwise, and retrieve it by their features.

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
    readings = [torch.stack(one) for one in zip(*_read_tiles(root, tiles, seed), strict=True)]  # 5 of (N, 3, S, S)
    chosen_device = distributed.choose_device(device)

    def accuracy(features: Callable[[Tensor], Tensor]) -> float:
        reference, *queries = (features(pixels) for pixels in readings)
        return statistics.mean(self_retrieval_accuracy(query, reference) for query in queries)

    def of(loaded: LoadedBackbone) -> Callable[[Tensor], Tensor]:
        return lambda pixels: embed(loaded.backbone, pixels.split(BATCH), _normaliser(loaded), chosen_device, "fp32")

    return SelfRetrieval(len(tiles), accuracy(of(trained)), accuracy(of(untrained)), accuracy(pixel_features))


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


def _read_tiles(root: Path, tiles: list[TileRecord], seed: int) -> Iterator[list[Tensor]]:
    """Each tile, and its copies: uint8 (3, S, S)."""
    status, tiling = read_status(root), read_tiling(root)
    with progress.bar("self-retrieval", len(tiles)) as bar:
        for slide in dict.fromkeys(tile.slide_id for tile in tiles):
            row = status[slide]
            with SlideReader(row.image_path, tiling.geometry, row.spacing_um, reader=tiling.reader) as reader:
                for index, tile in ((i, t) for i, t in enumerate(tiles) if t.slide_id == slide):
                    rng = randomness.generator(seed, index, "own place: stain")
                    readings = [torch.from_numpy(reader.read_cell(tile.x, tile.y).copy()).permute(2, 0, 1)]
                    for turns, place in enumerate(_shifted(tile, reader.lattice.slide_size)):
                        readings.append(second_reading(np.rot90(reader.read_cell(*place), turns), rng))
                    yield readings
                    bar.advance()


def _shifted(tile: TileRecord, slide_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Places of the copies of a tile: the other way along an axis where one would lie outside the slide."""
    shift = math.floor(SHIFT * tile.step_lv0)

    def along(start: int, sign: int, size: int) -> int:
        inside = 0 <= start + sign * shift <= size - tile.step_lv0
        return start + (sign if inside else -sign) * shift

    (width, height) = slide_size
    return [(along(tile.x, right, width), along(tile.y, down, height)) for right, down in TOWARDS]
