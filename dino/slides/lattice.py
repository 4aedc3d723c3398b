"""The lattice of a slide, which defines both its tiles and its regions.

Its origin is (0, 0), and its step is the level-0 footprint of one tile. A region consists of ``n x n`` cells, so its
footprint is exactly ``n`` steps and not rounded separately; a cell is the same rectangle, whether it is cut as a tile
or read for a region. All positions are ``(x, y)`` of top-left corners in level-0 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError


def cells_per_side(region_size_px: int, tile_size_px: int) -> int:
    """Number of tiles along the side of a region.

    Raises:
        ConfigError: If the region is not an integer multiple of the tile.
    """
    cells, rest = divmod(region_size_px, max(tile_size_px, 1))
    if rest or cells < 1:
        raise ConfigError(
            f"expected region_size_px to be a multiple of tile_size_px={tile_size_px}, found {region_size_px}; "
            f"the nearest are {max(cells, 1) * tile_size_px} and {(max(cells, 1) + 1) * tile_size_px}"
        )
    return cells


@dataclass(frozen=True)
class Geometry:
    """The requested lattice, the same for every slide; recorded in tiling.json.

    Attributes:
        spacing_um: Spacing of the tiles in µm per px.
        tile_size_px: Side of a tile at that spacing.
        overlap: Fraction of its side that a tile shares with the next, ``1 - 1/k`` for an integer ``k``.
        region_cells: Cells along the side of a region.
        region_overlap_cells: Cells that neighbouring regions share.
        tolerance: Relative difference of spacing that is accepted without resampling.
    """

    spacing_um: float = TileConfig.spacing_um
    tile_size_px: int = TileConfig.tile_size_px
    overlap: float = TileConfig.overlap
    region_cells: int = TileConfig.region_size_px // TileConfig.tile_size_px
    region_overlap_cells: int = TileConfig.region_overlap_cells
    tolerance: float = TileConfig.tolerance

    @classmethod
    def of(cls, config: TileConfig) -> "Geometry":
        """The lattice that ``config`` requests.

        Raises:
            ConfigError: If a setting is out of range or does not fit another.
        """
        shared = {item.name: getattr(config, item.name) for item in fields(cls) if hasattr(config, item.name)}
        return cls(region_cells=cells_per_side(config.region_size_px, config.tile_size_px), **shared)

    def __post_init__(self) -> None:
        """Reject values that do not define a lattice."""
        for name, good, rule in (
            ("spacing_um", self.spacing_um > 0, "a positive number"),
            ("tile_size_px", self.tile_size_px > 0, "a positive number"),
            ("tolerance", 0 <= self.tolerance < 0.5, "a number in [0, 0.5)"),
            ("overlap", 0 <= self.overlap < 1 and self._overlap_fits(), "0, 1/2, 2/3, 3/4, ... (1 - 1/k)"),
            ("region_cells", self.region_cells > 0, "a positive number"),
            (
                "region_overlap_cells",
                0 <= self.region_overlap_cells < self.region_cells,
                f"a number from 0 to {self.region_cells - 1} (a region has {self.region_cells} cells per side)",
            ),
        ):
            if not good:
                raise ConfigError(f"expected {name} to be {rule}, found {getattr(self, name)}")

    @property
    def positions_per_step(self) -> int:
        """``k``: number of tile origins per step, along each axis."""
        return round(1 / (1 - self.overlap))

    @property
    def region_size_px(self) -> int:
        """Side of a region at the requested spacing."""
        return self.region_cells * self.tile_size_px

    def _overlap_fits(self) -> bool:
        return abs(self.overlap - (1 - 1 / self.positions_per_step)) < 1e-3  # 0.667 means 2/3


@dataclass(frozen=True)
class Pyramid:
    """Size and resolution of one slide.

    Attributes:
        spacing_um: Spacing of level 0 in µm per px.
        dimensions: ``(width, height)`` of each level in px.
        downsamples: Downsample of each level relative to level 0.
    """

    spacing_um: float
    dimensions: Sequence[tuple[int, int]]
    downsamples: Sequence[float]


@dataclass(frozen=True)
class Lattice:
    """Every possible position of a tile or a region on one slide.

    Attributes:
        geometry: The requested lattice.
        slide_size: ``(width, height)`` in level-0 px.
        step_lv0: Level-0 footprint of one tile, and distance between neighbouring cells.
        read_level: Pyramid level that pixels are read from.
        read_size_px: Side of a cell at that level; resampled to ``tile_size_px`` where the two differ.
        read_downsample: Downsample of that level.
        level_size: ``(width, height)`` of that level.
        spacing_um: Actual spacing of the tiles: within the tolerance, the slide's own.
    """

    geometry: Geometry
    slide_size: tuple[int, int]
    step_lv0: int
    read_level: int
    read_size_px: int
    read_downsample: float
    level_size: tuple[int, int]
    spacing_um: float

    @property
    def columns(self) -> int:
        """Cells along x."""
        return len(self._axis(0, 1))

    @property
    def rows(self) -> int:
        """Cells along y."""
        return len(self._axis(1, 1))

    def cell_origins(self) -> np.ndarray:
        """``(rows * columns, 2)`` int64 origins of the cells, row-major (y, then x)."""
        return _row_major(self._axis(0, 1), self._axis(1, 1))

    def tile_origins(self) -> np.ndarray:
        """``(N, 2)`` int64 origins of all tiles, row-major; they include every cell, whatever the overlap."""
        k = self.geometry.positions_per_step
        return _row_major(self._axis(0, k), self._axis(1, k))

    def region_cells(self) -> np.ndarray:
        """``(M, 2)`` int64 ``(column, row)`` of the first cell of every region inside the slide, row-major."""
        n = self.geometry.region_cells
        stride = n - self.geometry.region_overlap_cells
        return _row_major(np.arange(0, self.columns - n + 1, stride), np.arange(0, self.rows - n + 1, stride))

    def region_origins(self) -> np.ndarray:
        """``(M, 2)`` int64 origins of every region inside the slide, row-major."""
        return self.region_cells() * self.step_lv0

    def cells_of_region(self, x: int, y: int) -> np.ndarray:
        """``(n * n, 2)`` int64 origins of the cells of the region at ``(x, y)``, row-major (y, then x)."""
        return cells_of_region(x, y, self.step_lv0, (self.geometry.region_cells, self.geometry.region_cells))

    def clamped(self, x: int, y: int) -> tuple[int, int]:
        """The nearest position whose tile is inside the slide, at level 0 and at the level it is read from.

        Raises:
            DataError: If the slide is smaller than a tile.
        """
        sides = zip(self.slide_size, self.level_size, strict=True)
        ends = [
            min(size - self.step_lv0, int((level - self.read_size_px) * self.read_downsample)) for size, level in sides
        ]
        if min(ends) < 0:
            width, height = self.slide_size
            raise DataError(
                f"expected a slide of at least {self.step_lv0} px for tiles of {self.geometry.tile_size_px} px at "
                f"{self.geometry.spacing_um:g} µm/px, found {width} x {height} px"
            )
        return min(max(x, 0), ends[0]), min(max(y, 0), ends[1])

    def _axis(self, axis: int, positions: int) -> np.ndarray:
        """Origins along one axis whose tile is inside the slide, at level 0 and at the level it is read from."""
        step, size = self.step_lv0, self.slide_size[axis]
        offsets = (2 * step * np.arange(positions) + positions) // (2 * positions)  # round(step * j / k)
        origins = (step * np.arange(size // step)[:, None] + offsets).reshape(-1)
        level_ends = np.floor(origins / self.read_downsample).astype(np.int64) + self.read_size_px
        return origins[(origins + step <= size) & (level_ends <= self.level_size[axis])]


def cells_of_region(x: int, y: int, step_lv0: int, grid: tuple[int, int]) -> np.ndarray:
    """Origins of the cells of one region, in the row order of its feature file.

    Args:
        x: Level-0 x of the region.
        y: Level-0 y of the region.
        step_lv0: Step of the lattice.
        grid: ``(h, w)`` cells.

    Returns:
        ``(h * w, 2)`` int64 ``(x, y)``, row-major (y, then x).
    """
    return _row_major(x + step_lv0 * np.arange(grid[1]), y + step_lv0 * np.arange(grid[0]))


def plan_lattice(pyramid: Pyramid, geometry: Geometry, slide: str) -> Lattice:
    """Compute the lattice of one slide; hs2p decides the level, the size of a read, and a tile's level-0 footprint.

    Args:
        pyramid: The slide's levels.
        geometry: The requested lattice.
        slide: Name of the slide, for the error.

    Raises:
        DataError: If the slide is coarser than the requested spacing (pixels are never upsampled).
    """
    from hs2p.wsi.geometry import plan_spacing_read, tile_size_lv0_from_plan

    requested = geometry.spacing_um
    if pyramid.spacing_um > requested * (1 + geometry.tolerance):
        raise DataError(
            f"expected slide '{slide}' to have at most {requested:g} µm/px (within {geometry.tolerance:.0%}), found "
            f"{pyramid.spacing_um:g} at its finest level; exclude the slide, correct spacing_at_level_0 in its row of "
            f"the slide list, or tile all slides with spacing_um={pyramid.spacing_um:g} (into another ROOT, if this "
            "one has tiles)"
        )
    plan = plan_spacing_read(
        requested_spacing_um=requested,
        level0_spacing_um=pyramid.spacing_um,
        level_downsamples=[(d, d) for d in pyramid.downsamples],
        target_size_px=(geometry.tile_size_px, geometry.tile_size_px),
        tolerance=geometry.tolerance,
        content_kind="image",
    )
    read_size = plan.read_size_px[0]
    return Lattice(
        geometry=geometry,
        slide_size=pyramid.dimensions[0],
        step_lv0=max(1, tile_size_lv0_from_plan(plan, level0_spacing_um=pyramid.spacing_um)),
        read_level=plan.level,
        read_size_px=read_size,
        read_downsample=pyramid.downsamples[plan.level],
        level_size=pyramid.dimensions[plan.level],
        spacing_um=plan.read_spacing_um * read_size / geometry.tile_size_px,
    )


def _row_major(xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    y, x = np.meshgrid(ys, xs, indexing="ij")  # (rows, columns)
    return np.stack([x.reshape(-1), y.reshape(-1)], axis=1).astype(np.int64)
