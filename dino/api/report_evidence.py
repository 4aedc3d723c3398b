"""Gathers what a report shows: reads the slide, the samples and the networks of the runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino import distributed, progress
from dino.api.levels import build_level
from dino.api.own_place import cells_only, tile_normaliser
from dino.config.load import flatten, load_config, to_dict
from dino.config.schema import PatchConfig, PretrainConfig, RegionConfig
from dino.crops.images import ImageCrops
from dino.data.grids import read_grid
from dino.data.loader import DrawnBatches
from dino.errors import CheckpointError, ConfigError
from dino.extraction.embed import embed
from dino.files import read_json_lines
from dino.models.backbone import Backbone
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.report.evidence import AttentionEvidence, CropEvidence, FeatureEvidence, RunEvidence, SlideEvidence
from dino.report.maps import Ground
from dino.report.page import Verdict
from dino.report.projection import spread_out
from dino.slides.reader import SlideReader
from dino.slides.tables import OK, RegionRecord, TileRecord, read_regions, read_status, read_tiles, read_tiling
from dino.train.run_folder import RunFolder

THUMBNAIL = 1600  # px of the longer side
LARGEST_MAP = 2500  # tiles that are embedded for the maps
SHOWN_CROPS = 4
SHOWN_TILES = 4
SHOWN_REGIONS = 3
REGION_PICTURE = 512  # px of a region's side in the report
BATCH = 32


@dataclass(frozen=True)
class FinishedRun:
    """A run as its folder holds it: settings, trained and untrained network, log and status."""

    folder: Path
    config: PretrainConfig
    trained: LoadedBackbone
    untrained: LoadedBackbone
    lines: list[dict[str, Any]]
    status: dict[str, Any]

    def evidence(self, name: str) -> RunEvidence:
        """The run's curves, verdict and settings."""
        found = self.status.get("verdict")
        return RunEvidence(name, self.lines, _spoken(name, found) if found else None, flatten(to_dict(self.config)))


def open_run(folder: Path, schema: type[PatchConfig] | type[RegionConfig]) -> FinishedRun:
    """Read a run folder.

    Raises:
        CheckpointError: If it holds no checkpoint.
        ConfigError: If it is a run of another level, or its settings are damaged.
    """
    trained = load_backbone_file(folder)
    start = folder / "checkpoints" / "start.pt"
    if not start.exists():
        raise CheckpointError(
            f"expected the start weights at {start}, found none; a report needs a run of this package"
        )
    log = folder / "metrics.jsonl"
    return FinishedRun(
        folder,
        load_config(schema, file=folder / "config.yaml"),
        trained,
        load_backbone_file(start),
        read_json_lines(log) if log.exists() else [],
        RunFolder(folder).status(),
    )


class TiledSlide:
    """The slide of ROOT that the report looks at: the one with most regions, then most tiles.

    Args:
        root: ROOT of `dino tile`.

    Raises:
        DataError: If ROOT or the slide cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tiling, self.status = read_tiling(root), read_status(root)
        self.every_tile, self.every_region = read_tiles(root), read_regions(root)
        chosen = max(self.status.values(), key=lambda s: (s.status == OK, s.regions, s.tiles))
        self.slide_id = chosen.slide_id
        self.tiles = [tile for tile in self.every_tile if tile.slide_id == self.slide_id]
        self.regions = [region for region in self.every_region if region.slide_id == self.slide_id]
        self.shown_regions = most_tissue_apart(self.regions, SHOWN_REGIONS)
        self.reader = SlideReader(chosen.image_path, self.tiling.geometry, spacing_at_level_0=chosen.spacing_um)

    def close(self) -> None:
        """Close the slide."""
        self.reader.close()

    @property
    def spacing_um(self) -> float:
        """µm per px of the tiles."""
        return self.reader.lattice.spacing_um

    def evidence(self) -> SlideEvidence:
        """Where tiles and regions are."""
        thumbnail = self.reader.thumbnail(THUMBNAIL)
        downsample = self.reader.lattice.slide_size[0] / thumbnail.shape[1]
        regions = [(r.x, r.y, r.grid[1] * r.step_lv0, r.grid[0] * r.step_lv0) for r in self.regions]
        return SlideEvidence(
            slide_id=self.slide_id,
            ground=Ground(thumbnail, downsample, downsample * self.reader.spacing_um),
            tiles=np.array([(tile.x, tile.y) for tile in self.tiles]).reshape(-1, 2),
            side=self.reader.lattice.step_lv0,
            regions=np.array(regions, dtype=np.float64).reshape(-1, 4),
            shown_regions=self.shown_regions,
            slides=sum(row.status == OK for row in self.status.values()),
            all_tiles=len(self.every_tile),
            all_regions=len(self.every_region),
        )

    def pixels(self, tile: TileRecord) -> np.ndarray:
        """uint8, (S, S, 3)."""
        return self.reader.read_cell(tile.x, tile.y)

    def region_picture(self, region: RegionRecord) -> np.ndarray:
        """A region, put together from its cells: uint8, about ``REGION_PICTURE`` px a side."""
        side = max(8, REGION_PICTURE // max(region.grid))
        rows = []
        for row in range(region.grid[0]):
            cells = [self.reader.read_cell(region.x + c * region.step_lv0, region.y + row * region.step_lv0)
                     for c in range(region.grid[1])]  # fmt: skip
            small = [np.asarray(Image.fromarray(cell).resize((side, side), Image.Resampling.LANCZOS)) for cell in cells]
            rows.append(np.concatenate(small, axis=1))
        return np.concatenate(rows)


def most_tissue_apart(regions: Sequence[RegionRecord], count: int) -> list[int]:
    """Indices of regions with much tissue that overlap little: each in turn has the most tissue not yet shown."""
    left = {index: float(region.tissue.mean()) for index, region in enumerate(regions)}
    chosen: list[int] = []
    while left and len(chosen) < count:
        chosen.append(max(left, key=lambda i: left[i]))
        del left[chosen[-1]]
        left = {i: value * (1 - _shared(regions[i], regions[chosen[-1]])) for i, value in left.items()}
    return chosen


def crop_evidence(run: FinishedRun) -> CropEvidence:
    """The first samples of a patch-level run, cropped with the numbers of the run itself.

    Raises:
        DataError: If its data have moved.
    """
    level = build_level(run.config)
    if not isinstance(level.crops, ImageCrops):
        raise ConfigError(f"expected a patch-level run, found a region-level one in {run.folder}")
    batch = DrawnBatches(level.source, level.crops.draw, None, SHOWN_CROPS, run.config.seed)[0]
    views = level.crops.apply(batch.inputs, batch.parameters)  # of (V_g, B, 3, s, s)
    mean, std = (torch.tensor(v)[:, None, None] for v in (level.crops.mean, level.crops.std))
    rows: list[list[np.ndarray]] = [[] for _ in range(SHOWN_CROPS)]
    for group in views:
        for view in group * std + mean:
            for row, crop in zip(rows, view, strict=True):
                row.append((crop.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    return CropEvidence([tile.permute(1, 2, 0).numpy() for tile in batch.inputs], rows)


def feature_evidence(slide: TiledSlide, run: FinishedRun, device: str) -> FeatureEvidence:
    """Features of the slide's tiles by the trained and the untrained network."""
    geometry, step = slide.tiling.geometry, slide.reader.lattice.step_lv0
    tiles, positions, stride = slide.tiles, geometry.positions_per_step, 1
    if len(tiles) > LARGEST_MAP:
        tiles, positions = cells_only(tiles), 1
    while len(tiles) > LARGEST_MAP:  # every second, third, ... cell: a coarser map of the whole slide
        stride += 1
        tiles = [t for t in cells_only(slide.tiles) if not (t.x // step % stride or t.y // step % stride)]
    with progress.bar("features for the report", len(tiles)) as bar:
        pixels = []
        for tile in tiles:
            pixels.append(slide.pixels(tile))
            bar.advance()
    batches = _stack(pixels).split(BATCH)
    where, normalise, precision = (
        distributed.choose_device(device),
        tile_normaliser(run.trained),
        run.config.speed.precision,
    )
    untrained, trained = (
        embed(network.backbone, batches, normalise, where, precision).numpy()
        for network in (run.untrained, run.trained)
    )
    lattice = {id(tile) for tile in cells_only(tiles)}
    separate = [index for index, tile in enumerate(tiles) if id(tile) in lattice]
    square = step * stride / positions
    inset = (step - square) / 2 if stride == 1 else 0.0  # the middle of an overlapping tile is its own
    corners = np.array([(tile.x + inset, tile.y + inset) for tile in tiles])
    return FeatureEvidence(corners, square, untrained, trained, separate, [pixels[i] for i in separate])


def tile_attention(features: FeatureEvidence, run: FinishedRun, um_per_px: float, device: str) -> AttentionEvidence:
    """Attention over a few tiles that differ from one another."""
    chosen = spread_out(features.trained[features.separate], SHOWN_TILES)
    pictures = [features.pixels[index] for index in chosen]
    inputs, patch_size = tile_normaliser(run.trained)(_stack(pictures)), run.trained.backbone.spec.patch_size
    trained, untrained = (
        _attention(network.backbone, inputs, patch_size, device) for network in (run.trained, run.untrained)
    )
    return AttentionEvidence(pictures, trained, untrained, um_per_px)


def region_attention(slide: TiledSlide, run: FinishedRun, device: str) -> AttentionEvidence | None:
    """Attention over the shown regions; None where their features have not been extracted."""
    regions = [slide.regions[index] for index in slide.shown_regions]
    regions = [region for region in regions if (slide.root / region.path).exists()]
    if not regions:
        return None
    order = getattr(run.config, "grid_order", "yx")
    grids = torch.stack([read_grid(slide.root / region.path, order, region.grid) for region in regions])  # (n, D, h, w)
    trained, untrained = (_attention(network.backbone, grids, 1, device) for network in (run.trained, run.untrained))
    pictures = [slide.region_picture(region) for region in regions]
    cells_px = pictures[0].shape[0] / regions[0].grid[0]
    return AttentionEvidence(
        pictures, trained, untrained, slide.spacing_um * slide.tiling.geometry.tile_size_px / cells_px
    )


@torch.inference_mode()
def _attention(backbone: Backbone, inputs: Tensor, patch_size: int, device: str) -> np.ndarray:
    where = distributed.choose_device(device)
    weights = backbone.to(where).eval().last_attention(inputs.to(where))  # (n, heads, N)
    return weights.unflatten(2, (inputs.shape[2] // patch_size, inputs.shape[3] // patch_size)).cpu().numpy()


def _shared(first: RegionRecord, second: RegionRecord) -> float:
    """Share of a region that another one of the same size covers."""
    width, height = first.grid[1] * first.step_lv0, first.grid[0] * first.step_lv0
    across, down = 1 - abs(first.x - second.x) / width, 1 - abs(first.y - second.y) / height
    return max(0.0, across) * max(0.0, down)


def _stack(pixels: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()  # (n, 3, S, S)


def _spoken(name: str, verdict: Mapping[str, str]) -> Verdict:
    """A verdict in three parts. Its text is "Word. A sentence or two. The numbers behind it."."""
    said, _, numbers = verdict["text"].removeprefix(f"{verdict['word'].capitalize()}. ").rpartition(". ")
    return Verdict(name, verdict["word"], f"{said}." if said else numbers, numbers if said else "")
