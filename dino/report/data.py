"""Data of a report, as its sections take them; :mod:`dino.report.gather` and :mod:`dino.report.slides` read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dino.models.inputs import INPUTS
from dino.report import methods
from dino.report.figures import Thumbnail
from dino.report.tiles import TileSet
from dino.report.words import WordData
from dino.slides.partitions import PRETRAIN
from dino.slides.tables import OK, SlideStatus


@dataclass(frozen=True)
class RootData:
    """What the tables of a ROOT record of all slides.

    Attributes:
        status: Status of each slide.
        tiles: Number of tiles by slide.
        regions: Number of regions by slide.
        settings: Settings of the tiling.
    """

    status: Mapping[str, SlideStatus]
    tiles: Mapping[str, int]
    regions: Mapping[str, int]
    settings: Mapping[str, Any]

    @cached_property
    def tiled(self) -> list[SlideStatus]:
        """The slides that were tiled."""
        return [row for row in self.status.values() if row.status == OK]

    @cached_property
    def held_out(self) -> tuple[int, int, int]:
        """Numbers of slides, tiles and regions among these that are held out from pretraining."""
        slides = [row.slide_id for row in self.tiled if row.partition not in PRETRAIN]
        tiles, regions = (sum(found.get(slide, 0) for slide in slides) for found in (self.tiles, self.regions))
        return len(slides), tiles, regions


@dataclass(frozen=True)
class SlideData:
    """The shown slide.

    Attributes:
        slide_id: Its name.
        thumbnail: Its thumbnail.
        tiles: Level-0 px, (N, 2): x, y of every tile.
        side: Side of a tile in level-0 px.
        regions: Level-0 px, (M, 4): x, y, width, height.
        shown_regions: Indices of the regions whose attention is shown.
    """

    slide_id: str
    thumbnail: Thumbnail
    tiles: np.ndarray
    side: float
    regions: np.ndarray
    shown_regions: Sequence[int]


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        level: ``patch`` or ``region``.
        folder: Name of its folder.
        name: What it is called on the page.
        lines: Its ``metrics.jsonl``.
        last: Its last metrics.
        status: Its ``status.json``.
        settings: Its settings by dotted key.
        scores: What ``dino evaluate`` wrote into its folder, by name of the file.
        damaged: Names of the files among these that cannot be read.
        quarantine: Name of each sample that could not be read, and the reason.
        method: Its part of the methods paragraph; None without a checkpoint.
    """

    level: str
    folder: str
    name: str
    lines: Sequence[Mapping[str, Any]]
    last: Mapping[str, float]
    status: Mapping[str, Any]
    settings: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    damaged: Sequence[str] = ()
    quarantine: Sequence[tuple[str, str]] = ()
    method: methods.Run | None = None

    @property
    def is_pretrained(self) -> bool:
        """Whether it started from ``model.init``."""
        return bool(self.settings.get("model.init"))

    @property
    def reads_images(self) -> bool:
        """Whether its samples are images, not feature grids."""
        return INPUTS[self.level].normalized


@dataclass(frozen=True)
class CropData:
    """Training samples and their crops: uint8, (H, W, 3) tiles and (s, s, 3) crops of each.

    Tiles are of one spacing, or of several: then they have no scale bar.
    """

    tiles: Sequence[np.ndarray]
    crops: Sequence[Sequence[np.ndarray]]
    one_spacing: bool = True


@dataclass(frozen=True)
class AttentionData:
    """Attention of the cls token in the last block.

    Attributes:
        images: uint8 (H, W, 3) each.
        trained: (n, heads, h, w).
        untrained: (n, heads, h, w).
        um_per_px: µm per px of the images; 0 where it is not known.
    """

    images: Sequence[np.ndarray]
    trained: np.ndarray
    untrained: np.ndarray
    um_per_px: float


@dataclass(frozen=True)
class MapData:
    """Features of the tiles of the shown slide.

    Attributes:
        corners: Level-0 px, (N, 2): upper left corner of the square that each tile fills on the map.
        square: Side of that square in level-0 px.
        untrained: Float, (N, D), of the untrained network.
        trained: Float, (N, D), of the trained one.
    """

    corners: np.ndarray
    square: float
    untrained: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class FeatureData:
    """What a network makes of tiles.

    Attributes:
        name: The run.
        tiles: Tiles among which neighbours are searched.
        untrained: Float, (M, D): their features by the untrained network.
        trained: The same by the trained one.
        map: Features over the shown slide; None without a slide.
        attention: Attention over a few of the tiles.
    """

    name: str
    tiles: TileSet
    untrained: np.ndarray
    trained: np.ndarray
    map: MapData | None = None
    attention: AttentionData | None = None


@dataclass(frozen=True)
class ReportData:
    """Data of a report; a part that is None or empty is omitted.

    Attributes:
        root: Tables of the data folder.
        slide: Tiles and regions of one slide.
        runs: Runs, patch level first.
        crops: Crops of the first patch-level run.
        features: Tile features by each patch-level run.
        self_retrieval: Accuracies ``teacher``, ``untrained`` and ``pixels``, and the number of ``tiles``.
        region_attention: Attention by the name of each region-level run.
        words: The words of each patch-level run that has any.
        um_per_px: µm per px of the tiles; 0 where it is not known.
        left_out: What the page lacks, and why, in sentences.
        notice: A paragraph at the top of the page.
        device: Hardware that was used.
        versions: Version of each package by name.
    """

    root: RootData | None = None
    slide: SlideData | None = None
    runs: Sequence[RunData] = ()
    crops: CropData | None = None
    features: Sequence[FeatureData] = ()
    self_retrieval: Mapping[str, Any] | None = None
    region_attention: Mapping[str, AttentionData] = field(default_factory=dict)
    words: Sequence[WordData] = ()
    um_per_px: float = 0.0
    left_out: Sequence[str] = ()
    notice: str = ""
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
