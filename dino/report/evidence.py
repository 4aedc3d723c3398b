"""What a report is made from: plain arrays and numbers, gathered elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dino.report.maps import Ground
from dino.report.page import Verdict


@dataclass(frozen=True)
class SlideEvidence:
    """The slide that the pictures are of.

    Attributes:
        slide_id: Its name.
        ground: Its thumbnail.
        tiles: Level-0 px, (N, 2): x, y of every tile.
        side: Side of a tile in level-0 px.
        regions: Level-0 px, (M, 4): x, y, width, height.
        shown_regions: Which regions the report looks into.
        slides: How many slides there are in all.
        all_tiles: How many tiles, over all slides.
        all_regions: How many regions, over all slides.
    """

    slide_id: str
    ground: Ground
    tiles: np.ndarray
    side: float
    regions: np.ndarray
    shown_regions: Sequence[int]
    slides: int
    all_tiles: int
    all_regions: int


@dataclass(frozen=True)
class CropEvidence:
    """Training samples as the network saw them: uint8 (H, W, 3) tiles, and the crops of each."""

    tiles: Sequence[np.ndarray]
    crops: Sequence[Sequence[np.ndarray]]


@dataclass(frozen=True)
class RunEvidence:
    """One run.

    Attributes:
        name: "Patch level" or "Region level".
        lines: Its ``metrics.jsonl``.
        verdict: What it came to, or None where it has not ended.
        settings: Its settings by dotted key.
    """

    name: str
    lines: Sequence[Mapping[str, Any]]
    verdict: Verdict | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class FeatureEvidence:
    """Tile features of one slide by the untrained and the trained network.

    Attributes:
        squares: Level-0 px, (N, 2): upper left corner of the square that each tile colours.
        square: Side of that square in level-0 px.
        untrained: Float, (N, D).
        trained: Float, (N, D).
        separate: Indices of tiles that do not overlap one another: the neighbours are sought among these.
        pixels: uint8 (H, W, 3) of each separate tile.
    """

    squares: np.ndarray
    square: float
    untrained: np.ndarray
    trained: np.ndarray
    separate: Sequence[int]
    pixels: Sequence[np.ndarray]


@dataclass(frozen=True)
class AttentionEvidence:
    """Attention of the cls token in the last block.

    Attributes:
        pictures: uint8 (H, W, 3) each.
        trained: (n, heads, h, w).
        untrained: (n, heads, h, w).
        um_per_px: µm per px of the pictures.
    """

    pictures: Sequence[np.ndarray]
    trained: np.ndarray
    untrained: np.ndarray
    um_per_px: float


@dataclass(frozen=True)
class Evidence:
    """Everything that could be found; what is None has no place in the report."""

    slide: SlideEvidence | None = None
    crops: CropEvidence | None = None
    runs: Sequence[RunEvidence] = ()
    features: FeatureEvidence | None = None
    own_place: Mapping[str, Any] | None = None
    tile_attention: AttentionEvidence | None = None
    region_attention: AttentionEvidence | None = None
    tile_um_per_px: float = 0.5
    notes: Sequence[str] = field(default_factory=tuple)
