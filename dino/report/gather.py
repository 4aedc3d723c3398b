"""Data of a report: applies the networks of a run to tiles and regions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino.config.load import flatten, to_dict
from dino.config.schema import PretrainConfig
from dino.crops.images import ImageCrops
from dino.data.loader import Batch, DrawnBatches
from dino.extraction.embed import embed, normaliser_of
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.report import methods
from dino.report.data import AttentionData, CropData, FeatureData, MapData, RunData
from dino.report.projection import farthest_points
from dino.report.slides import MapTiles, TiledSlide
from dino.report.tiles import TileSet
from dino.train.run_folder import RunReader

SHOWN_CROPS = 4
SHOWN_TILES = 4
BATCH = 32


@dataclass(frozen=True)
class LoadedRun:
    """The networks of a run.

    Attributes:
        reader: Reader of its folder.
        config: Its settings.
        trained: The teacher of its best or last checkpoint.
        untrained: The network before the first step.
    """

    reader: RunReader
    config: PretrainConfig
    trained: LoadedBackbone
    untrained: LoadedBackbone

    def method(self) -> methods.Run:
        """Its part of the methods paragraph."""
        status, training, backbone = self.reader.status(), self.config.training, self.trained.backbone
        batch_size = status.get("global_batch", training.batch_size_per_gpu * training.gradient_accumulation)
        return methods.Run(
            to_dict(self.config),
            self.trained.step or 0,
            batch_size,
            *(backbone.embed_dim, backbone.depth, backbone.num_heads),
            split=methods.split_of(status),
            segments=self.trained.details.get("segments") or (),
            precision=status.get("computed_in"),
        )


def load_run(path: Path) -> LoadedRun:
    """Load the trained and the untrained network of a run.

    Args:
        path: The run folder.

    Raises:
        CheckpointError: If there is no checkpoint, or no initial one.
        ConfigError: If its settings are damaged.
    """
    reader = RunReader(path)
    trained = load_backbone_file(reader.checkpoint())
    untrained = load_backbone_file(reader.initial_checkpoint())
    return LoadedRun(reader, reader.config(), trained, untrained)


def run_data(reader: RunReader, name: str, networks: LoadedRun | None) -> RunData:
    """Log, status, settings and results of a run.

    Args:
        reader: Its folder.
        name: What it is called on the page.
        networks: Its networks, if it has any yet.

    Raises:
        ConfigError: If the folder holds no run, or its settings are damaged.
    """
    return RunData(
        level=reader.level(),
        folder="/".join(reader.path.absolute().parts[-2:]),
        name=name,
        lines=reader.log_lines(),
        last=reader.last_metrics(),
        status=reader.status(),
        settings=flatten(to_dict(reader.config())),
        scores=reader.scores(),
        damaged=reader.damaged_scores(),
        quarantine=reader.quarantine(),
        method=networks.method() if networks else None,
    )


def first_crops(level: Any, seed: int) -> CropData:
    """Crops of the first samples of a level of images, with the same random numbers as in training.

    Args:
        level: Its ``dataset``, ``sampler(seed)`` and ``crops``.
        seed: Seed of the run.
    """
    batch = DrawnBatches(level.dataset, level.sampler(seed), level.crops.draw, None, SHOWN_CROPS, seed)[0]
    return crop_data(batch, level.crops, one_spacing=not level.geometry.get("spacings_um"))


def crop_data(batch: Batch, crops: ImageCrops, *, one_spacing: bool = True) -> CropData:
    """The crops of a batch as images.

    Args:
        batch: Tiles and the parameters of their crops.
        crops: Applies the parameters.
        one_spacing: Whether all tiles have the spacing of tiling.
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in (crops.mean, crops.std))
    rows: list[list[np.ndarray]] = [[] for _ in batch.inputs]
    for group in crops.apply(batch.inputs, batch.parameters):  # (V, B, 3, s, s) of each size s
        for view in group * std + mean:
            for row, crop in zip(rows, view, strict=True):
                row.append((crop.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    tiles = batch.inputs if batch.inputs.ndim == 4 else batch.inputs[:, 0]  # the picture of the global crops
    return CropData([tile.permute(1, 2, 0).numpy() for tile in tiles], rows, one_spacing)


def feature_data(
    name: str, run: LoadedRun, tiles: TileSet | None, mapped: MapTiles | None, device: torch.device
) -> FeatureData:
    """Features of tiles by the trained and the untrained network of a patch-level run.

    Args:
        name: What the run is called on the page.
        run: The run.
        tiles: Tiles among which neighbours are searched; None for those of the map that do not overlap.
        mapped: Tiles of the map, if there is one.
        device: Where to compute.
    """
    if mapped is None:
        assert tiles is not None
        untrained, trained = _embed(run, tiles.pixels, device)
        return FeatureData(name, tiles, untrained, trained)
    untrained, trained = _embed(run, mapped.pixels, device)
    found = MapData(mapped.corners, mapped.square, untrained, trained)
    if tiles is None:
        return FeatureData(name, mapped.tiles, untrained[mapped.disjoint], trained[mapped.disjoint], found)
    untrained, trained = _embed(run, tiles.pixels, device)
    return FeatureData(name, tiles, untrained, trained, found)


def _embed(run: LoadedRun, pixels: Sequence[np.ndarray], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) by the untrained and by the trained network."""
    batches = to_tensor(pixels).split(BATCH)
    untrained, trained = (embed_tiles(network, batches, device) for network in (run.untrained, run.trained))
    return untrained, trained


def embed_tiles(network: LoadedBackbone, batches: Sequence[Tensor], device: torch.device) -> np.ndarray:
    """Features of tiles: float32 (N, D).

    Args:
        network: A patch-level network.
        batches: uint8, (B, 3, S, S) each.
        device: Where to compute; bf16 on a GPU, else fp32.
    """
    precision = "bf16" if device.type == "cuda" else "fp32"
    return embed(network.backbone, batches, normaliser_of(network), device, precision).numpy()


def tile_attention(features: FeatureData, run: LoadedRun, device: torch.device) -> AttentionData:
    """Attention of a patch-level run over a few dissimilar tiles."""
    chosen = farthest_points(features.trained, SHOWN_TILES)
    images = [features.tiles.pixels[index] for index in chosen]
    inputs = normaliser_of(run.trained)(to_tensor(images))
    return AttentionData(images, *_attention(run, inputs, device), features.tiles.um_per_px)


def region_attention(slide: TiledSlide, run: LoadedRun, device: torch.device) -> AttentionData | None:
    """Attention of a region-level run over the shown regions; None if their features have not been extracted."""
    regions, grids = slide.region_grids(getattr(run.config, "grid_order", "yx"), run.trained.grids)
    if grids is None:
        return None
    images = [slide.region_image(region) for region in regions]
    cell_px = images[0].shape[0] / regions[0].grid[0]
    um_per_px = slide.spacing_um * slide.root.tiling.geometry.tile_size_px / cell_px
    return AttentionData(images, *_attention(run, grids, device), um_per_px)


def _attention(run: LoadedRun, inputs: Tensor, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the trained and of the untrained network, (n, heads, h, w) each."""
    return attention_maps(run.trained, inputs, device), attention_maps(run.untrained, inputs, device)


@torch.inference_mode()
def attention_maps(network: LoadedBackbone, inputs: Tensor, device: torch.device) -> np.ndarray:
    """Attention of the cls token in the last block: float32 (B, heads, h, w).

    Args:
        network: The network.
        inputs: Normalised images (B, 3, H, W) or grids (B, D, h, w).
        device: Where to compute.
    """
    patch_size = network.backbone.spec.patch_size
    height, width = (side // patch_size for side in inputs.shape[2:])
    weights = network.backbone.to(device).eval().last_attention(inputs.to(device))  # (B, heads, h * w)
    return weights.unflatten(2, (height, width)).float().cpu().numpy()


def to_tensor(pixels: Sequence[np.ndarray]) -> Tensor:
    """Tiles (H, W, 3) as one uint8 tensor (n, 3, H, W)."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()  # (n, 3, S, S)
