"""Attention of the cls token over whole slides, of both levels and their product, in place.

As in the hierarchical heatmaps of HIPT (Chen et al. 2022, arXiv 2206.02647, figure 3): the attention of level 1 over
the tokens of a tile, that of level 2 over the tiles of a region, and their product. All are relative to uniform
attention, which is 1. Where tiles or regions overlap, every value is averaged at the place on the slide it belongs to.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino.config.schema import AttentionConfig
from dino.data.slide_tiles import cell_tensor
from dino.errors import ConfigError, DataError
from dino.extraction.embed import ATTENTION, batches, embed_batches, identity, normaliser_of, read_ahead
from dino.models.weights import LoadedBackbone
from dino.slides.reader import SlideReader

Cell = tuple[int, int]  # (row, column) of the lattice


class Canvas:
    """Values on a grid of squares, averaged where parts overlap.

    Args:
        channels: Number of values of each square, C.
        size: ``(H, W)`` squares.
    """

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        self._sum = np.zeros((channels, *size), np.float32)
        self._count = np.zeros(size, np.float32)

    def add(self, row: int, column: int, values: np.ndarray) -> None:
        """Add a part whose first square is ``(row, column)``.

        Args:
            row: Its row.
            column: Its column.
            values: ``(C, h, w)``.
        """
        rows, columns = slice(row, row + values.shape[1]), slice(column, column + values.shape[2])
        self._sum[:, rows, columns] += values
        self._count[rows, columns] += 1

    def mean(self) -> np.ndarray:
        """``(C, H, W)`` float32 means, NaN where there is no part; nothing can be added afterwards."""
        self._count[self._count == 0] = np.nan
        for channel in self._sum:  # one by one, and in place: a slide of 100,000 px has gigabytes of them
            np.divide(channel, self._count, out=channel)
        return self._sum


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Attention over a slide, relative to uniform attention.

    Attributes:
        tile: ``(1 + heads, H, W)`` of level 1: the mean over heads, then each head; a value per token. NaN where there
            is none, as in the others.
        region: ``(1 + heads, rows, columns)`` of level 2, a value per cell of the lattice; None without it.
        tokens: Tokens along the side of a cell: ``H = rows * tokens``.
        token_lv0: Side of a token in level-0 px.
    """

    tile: np.ndarray
    region: np.ndarray | None
    tokens: int
    token_lv0: float

    def names(self) -> list[str]:
        """Names of the channels that :meth:`channels` yields."""
        names = ["tile", *(f"tile head {head}" for head in range(1, len(self.tile)))]
        if self.region is not None:
            names += ["region", *(f"region head {head}" for head in range(1, len(self.region))), "tile x region"]
        return names

    def channels(self) -> Iterator[np.ndarray]:
        """Maps of one size, ``(H, W)`` float32 each: of level 1, of level 2, and the product of their means."""
        yield from self.tile
        if self.region is not None:
            yield from (self._enlarged(one) for one in self.region)
            yield self.tile[0] * self._enlarged(self.region[0])

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


@dataclass(frozen=True)
class AttentionModels:
    """The models whose attention is mapped.

    Attributes:
        tile: Level 1.
        region: Level 2, if any.
        config: Settings of the computation.
        device: Where to compute.
    """

    tile: LoadedBackbone
    region: LoadedBackbone | None
    config: AttentionConfig
    device: torch.device

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
        return AttentionMaps(tile, region, tokens, lattice.step_lv0 / tokens)

    def _tiles(
        self, reader: SlideReader, cells: Sequence[Cell], size: tuple[int, int], advance: Callable[[int], None]
    ) -> tuple[np.ndarray, int]:
        """Level 1: ``(1 + heads, H, W)``, and the tokens along the side of a tile."""
        step, offsets = reader.lattice.step_lv0, self.config.offsets
        places = list(shifted_cells(cells, offsets))  # in units of step / offsets

        def read(place: Cell) -> Tensor:
            return cell_tensor(reader, *reader.lattice.clamped(*(round(one * step / offsets) for one in place[::-1])))

        inputs = read_ahead(read, places, self.config.num_workers, 2 * self.config.batch_size)
        found = embed_batches(
            self.tile.backbone,
            batches(inputs, self.config.batch_size),
            normaliser_of(self.tile),
            self.device,
            self.config.precision,
            ATTENTION,
        )
        canvas, tokens, heads, done = None, 0, self.tile.backbone.num_heads, 0
        for weights in found:
            if canvas is None:
                tokens = round((weights.shape[1] / heads) ** 0.5)
                if tokens % offsets:
                    raise ConfigError(f"expected offsets to divide the {tokens} tokens of a tile, found {offsets}")
                canvas = Canvas(1 + heads, (size[0] * tokens, size[1] * tokens))
            for place, values in zip(places[done:], relative(weights, heads, (tokens, tokens)), strict=False):
                row, column = (one * tokens // offsets for one in place)
                canvas.add(row, column, values)
            done += len(weights)
            advance(len(weights))
        if canvas is None:
            raise DataError(f"expected tiles of {reader.path}, found none")
        return canvas.mean(), tokens

    def _regions(self, features: Mapping[Cell, np.ndarray], size: tuple[int, int]) -> np.ndarray:
        """Level 2: ``(1 + heads, rows, columns)``, averaged over all regions at every ``stride``-th cell."""
        assert self.region is not None
        backbone, (height, width) = self.region.backbone, self._region_cells()
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
        found = embed_batches(
            backbone, batches(grids, self.config.batch_size), identity, self.device, self.config.precision, ATTENTION
        )
        canvas, done = Canvas(1 + backbone.num_heads, size), 0
        for weights in found:
            for (row, column), values in zip(
                corners[done:], relative(weights, backbone.num_heads, (height, width)), strict=False
            ):
                canvas.add(row, column, values)
            done += len(weights)
        return canvas.mean()

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
