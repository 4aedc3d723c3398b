"""Attention of the cls token over whole slides, of both levels and their product, in place.

As in the hierarchical heatmaps of HIPT (Chen et al. 2022, arXiv 2206.02647, figure 3): the attention of level 1 over
the tokens of a tile, that of level 2 over the tiles of a region, and their product. All are relative to uniform
attention, which is 1. Where tiles or regions overlap, every value is averaged at the place on the slide it belongs to.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino.config.schema import AttentionConfig
from dino.data.slide_tiles import cell_tensor
from dino.errors import ConfigError, DataError
from dino.extraction.embed import ATTENTION, ROLLOUT, batches, embed_batches, normaliser_of, read_ahead
from dino.models.weights import LoadedBackbone
from dino.slides.reader import SlideReader

Cell = tuple[int, int]  # (row, column) of the lattice


class StoredMaps:
    """Maps in a file without a name, written by rows and read by channels: those of a large slide are gigabytes.

    Args:
        channels: Number of maps, C.
        size: ``(H, W)``.
        folder: Folder of the file; None for that of temporary files.
    """

    def __init__(self, channels: int, size: tuple[int, int], folder: Path | None = None) -> None:
        self.shape = (channels, *size)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- open as long as the maps are

    def write(self, row: int, values: np.ndarray) -> None:
        """Write rows ``(C, h, W)`` float32, the first of which is ``row``."""
        _, height, width = self.shape
        for channel, part in enumerate(values):
            self._file.seek(4 * width * (channel * height + row))
            self._file.write(np.ascontiguousarray(part, np.float32).data)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[channel] for channel in range(len(self)))

    def __getitem__(self, channel: int) -> np.ndarray:
        """A map ``(H, W)`` float32, read each time."""
        channels, height, width = self.shape
        if not 0 <= channel < channels:
            raise IndexError(channel)
        values = np.empty((height, width), np.float32)
        self._file.seek(4 * width * height * channel)
        self._file.readinto(values.data)  # type: ignore[attr-defined]
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All maps, ``(C, H, W)``."""
        return np.stack([*self]).astype(dtype or np.float32)


class Canvas:
    """Values on a grid of squares, averaged where parts overlap. Only the rows that may still change are in memory.

    Args:
        channels: Number of values of each square, C.
        size: ``(H, W)`` squares.
        folder: Folder of the file of the others, see :class:`StoredMaps`.
    """

    def __init__(self, channels: int, size: tuple[int, int], folder: Path | None = None) -> None:
        self._maps, self._first = StoredMaps(channels, size, folder), 0
        self._sum = np.zeros((channels, 0, size[1]), np.float32)
        self._count = np.zeros((0, size[1]), np.float32)

    def add(self, row: int, column: int, values: np.ndarray) -> None:
        """Add a part whose first square is ``(row, column)``; no row of it may be finished.

        Args:
            row: Its row.
            column: Its column.
            values: ``(C, h, w)``.
        """
        top, bottom = row - self._first, row - self._first + values.shape[1]
        missing = bottom - len(self._count)
        if missing > 0:
            self._sum = np.pad(self._sum, ((0, 0), (0, missing), (0, 0)))
            self._count = np.pad(self._count, ((0, missing), (0, 0)))
        columns = slice(column, column + values.shape[2])
        self._sum[:, top:bottom, columns] += values
        self._count[top:bottom, columns] += 1

    def finish(self, row: int) -> None:
        """Say that nothing is added above ``row`` any more."""
        done = row - self._first
        if done <= 0:
            return
        known = min(done, len(self._count))
        channels, _, width = self._maps.shape
        means = np.full((channels, done, width), np.nan, np.float32)
        count = self._count[:known]
        np.divide(self._sum[:, :known], count, out=means[:, :known], where=count > 0)
        self._maps.write(self._first, means)
        self._sum, self._count, self._first = self._sum[:, known:].copy(), self._count[known:].copy(), row

    def mean(self) -> StoredMaps:
        """The means, ``(C, H, W)`` float32, NaN where there is no part; nothing can be added afterwards."""
        self.finish(self._maps.shape[1])
        return self._maps


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Attention over a slide, relative to uniform attention.

    Attributes:
        tile: ``(1 + heads, H, W)`` of level 1: the mean over heads, then each head; a value per token. NaN where there
            is none, as in the others.
        region: ``(1 + heads, rows, columns)`` of level 2, a value per cell of the lattice; None without it.
        tokens: Tokens along the side of a cell: ``H = rows * tokens``.
        token_lv0: Side of a token in level-0 px.
        kind: Added to the names: "" for the attention of the last block, which has heads, or " rollout".
    """

    tile: StoredMaps
    region: np.ndarray | None
    tokens: int
    token_lv0: float
    kind: str = ""

    def names(self) -> list[str]:
        """Names of the channels that :meth:`channels` yields."""
        return [f"{name}{self.kind}" for name in self._names()]

    def _names(self) -> list[str]:
        names = ["tile", *(f"tile head {head}" for head in range(1, len(self.tile)))]
        if self.region is not None:
            names += ["region", *(f"region head {head}" for head in range(1, len(self.region))), "tile x region"]
        return names

    def channels(self) -> Iterator[np.ndarray]:
        """Maps of one size, ``(H, W)`` float32 each: of level 1, of level 2, and the product of their means."""
        yield from self.tile
        if self.region is not None:
            yield from (self._enlarged(one) for one in self.region)
            product = self._enlarged(self.region[0])
            product *= self.tile[0]
            yield product

    def _enlarged(self, cells: np.ndarray) -> np.ndarray:
        return cells.repeat(self.tokens, 0).repeat(self.tokens, 1)


def relative(weights: Tensor, heads: int, size: tuple[int, int]) -> np.ndarray:
    """Attention weights relative to uniform ones.

    Args:
        weights: ``(B, heads * h * w)``.
        heads: Number of heads.
        size: ``(h, w)``.

    Returns:
        ``(B, 1 + heads, h, w)`` float32: the mean over heads, then each head; each head's mean over the tokens is 1.
    """
    maps = weights.unflatten(1, (heads, *size))  # (B, heads, h, w)
    maps = maps / maps.mean((2, 3), keepdim=True)
    return torch.cat([maps.mean(1, keepdim=True), maps], 1).numpy()


def maps_of(
    loaded: LoadedBackbone,
    inputs: Iterable[Tensor],
    device: torch.device,
    precision: str,
    method: str = ATTENTION,
    size: tuple[int, int] | None = None,
) -> Iterator[np.ndarray]:
    """Attention of a model of either level over batches of its inputs, relative to uniform attention.

    Args:
        loaded: The model.
        inputs: Batches of tiles, uint8 ``(B, 3, H, W)``, or of feature grids ``(B, D, h, w)``.
        device: Where to compute.
        precision: As in :func:`~dino.extraction.embed.embed_batches`.
        method: ``attention`` of the last block, or ``rollout`` through all blocks.
        size: Tokens ``(h, w)`` of an input; None for those of a square.

    Yields:
        For each batch ``(B, 1 + heads, h, w)`` float32, as :func:`relative`; of rollout, which has no heads, one map.
    """
    heads = 1 if method == ROLLOUT else loaded.backbone.num_heads
    for weights in embed_batches(loaded.backbone, inputs, normaliser_of(loaded), device, precision, method):
        side = round((weights.shape[1] / heads) ** 0.5)
        maps = relative(weights, heads, size or (side, side))
        yield maps[:, :1] if method == ROLLOUT else maps


@dataclass(frozen=True)
class AttentionModels:
    """The models whose attention is mapped.

    Attributes:
        tile: Level 1.
        region: Level 2, if any.
        config: Settings of the computation.
        device: Where to compute.
        folder: Folder of temporary files; None for the system's.
    """

    tile: LoadedBackbone
    region: LoadedBackbone | None
    config: AttentionConfig
    device: torch.device
    folder: Path | None = None

    def _maps_of(
        self, loaded: LoadedBackbone, inputs: Iterable[Tensor], size: tuple[int, int] | None = None
    ) -> Iterator[np.ndarray]:
        method = ROLLOUT if self.config.method == ROLLOUT else ATTENTION
        return maps_of(loaded, inputs, self.device, self.config.precision, method, size)

    def maps(
        self,
        reader: SlideReader,
        cells: Sequence[Cell],
        features: Mapping[Cell, np.ndarray],
        advance: Callable[[int], None] = lambda count: None,
    ) -> AttentionMaps:
        """Attention over one slide.

        Args:
            reader: The slide.
            cells: Cells of its lattice to look at with level 1.
            features: Level-1 features ``(D,)`` by cell, for level 2.
            advance: Called with the number of tiles of each batch.

        Raises:
            ConfigError: If ``offsets`` does not divide the tokens of a tile.
            DataError: If the slide cannot be read, or has no whole region of features.
        """
        lattice = reader.lattice
        size = (lattice.rows, lattice.columns)
        region = self._regions(features, size) if self.region is not None else None
        tile, tokens = self._tiles(reader, cells, size, advance)
        kind = f" {ROLLOUT}" if self.config.method == ROLLOUT else ""
        return AttentionMaps(tile, region, tokens, lattice.step_lv0 / tokens, kind)

    def _tiles(
        self, reader: SlideReader, cells: Sequence[Cell], size: tuple[int, int], advance: Callable[[int], None]
    ) -> tuple[StoredMaps, int]:
        """Level 1: ``(1 + heads, H, W)``, and the tokens along the side of a tile."""
        step, offsets = reader.lattice.step_lv0, self.config.offsets
        places = list(shifted_cells(cells, offsets))  # in units of step / offsets

        def read(place: Cell) -> Tensor:
            return cell_tensor(reader, *reader.lattice.clamped(*(round(one * step / offsets) for one in place[::-1])))

        inputs = read_ahead(read, places, self.config.num_workers, 2 * self.config.batch_size)
        canvas, tokens, done = None, 0, 0
        for maps in self._maps_of(self.tile, batches(inputs, self.config.batch_size)):
            if canvas is None:
                channels, tokens = maps.shape[1:3]
                if tokens % offsets:
                    raise ConfigError(f"expected offsets to divide the {tokens} tokens of a tile, found {offsets}")
                canvas = Canvas(channels, (size[0] * tokens, size[1] * tokens), self.folder)
            for place, values in zip(places[done:], maps, strict=False):
                row, column = (one * tokens // offsets for one in place)
                canvas.finish(place[0] // offsets * tokens)  # places are sorted by the row of their cell
                canvas.add(row, column, values)
            done += len(maps)
            advance(len(maps))
        if canvas is None:
            raise DataError(f"expected tiles of {reader.path}, found none")
        return canvas.mean(), tokens

    def _regions(self, features: Mapping[Cell, np.ndarray], size: tuple[int, int]) -> np.ndarray:
        """Level 2: ``(1 + heads, rows, columns)``, averaged over all regions at every ``stride``-th cell."""
        assert self.region is not None
        height, width = self._region_cells()
        corners = list(whole_windows(features, (height, width), self.config.stride))
        if not corners:
            raise DataError(
                f"expected the features of all {height} x {width} cells of at least one region, found none; extract "
                "the regions of this slide first"
            )
        grids = (
            torch.from_numpy(
                np.stack([features[row + i, column + j] for i in range(height) for j in range(width)], axis=1).reshape(
                    -1, height, width
                )
            ).float()
            for row, column in corners
        )
        canvas, done = None, 0
        for maps in self._maps_of(self.region, batches(grids, self.config.batch_size), (height, width)):
            canvas = canvas or Canvas(maps.shape[1], size)
            for (row, column), values in zip(corners[done:], maps, strict=False):
                canvas.add(row, column, values)
            done += len(maps)
        assert canvas is not None
        return np.asarray(canvas.mean())

    def _region_cells(self) -> tuple[int, int]:
        assert self.region is not None
        known = self.region.region_cells
        if known is None:
            raise DataError(f"expected a level-2 model with a record of the size of its regions: {self.region.source}")
        return known[0], known[1]


def shifted_cells(cells: Sequence[Cell], offsets: int) -> Iterator[Cell]:
    """The cells, and all places between them whose squares they cover completely.

    Args:
        cells: ``(row, column)`` of each.
        offsets: Places per cell along each axis.

    Yields:
        ``(row, column)`` in units of ``1 / offsets`` cells, sorted.
    """
    known = set(cells)
    for row, column in sorted(known):
        for down in range(offsets):
            for across in range(offsets):
                rows, columns = {row, row + (down > 0)}, {column, column + (across > 0)}
                if all((i, j) in known for i in rows for j in columns):
                    yield row * offsets + down, column * offsets + across


def whole_windows(cells: Mapping[Cell, object], size: tuple[int, int], stride: int) -> Iterator[Cell]:
    """First cells of all windows without a missing cell, at every ``stride``-th row and column.

    Args:
        cells: The known cells.
        size: ``(h, w)`` cells of a window.
        stride: In cells.
    """
    for row, column in sorted(cells):
        if row % stride or column % stride:
            continue
        if all((row + i, column + j) in cells for i in range(size[0]) for j in range(size[1])):
            yield row, column
