"""Data of a report: applies the networks of a run to tiles and regions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino.config.load import flatten, to_dict
from dino.config.schema import PretrainConfig
from dino.crops.images import ImageCrops
from dino.data.loader import Batch
from dino.errors import ConfigError
from dino.extraction.embed import Normalise, embed, normaliser
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.report import methods
from dino.report.projection import farthest_points
from dino.report.sections import AttentionData, CropData, FeatureData, RunData
from dino.report.slides import TiledSlide
from dino.train.run_folder import RunReader

SHOWN_TILES = 4
BATCH = 32


@dataclass(frozen=True)
class LoadedRun:
    """A run with its networks.

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

    def data(self) -> RunData:
        """Log, status and settings."""
        reader, training, backbone = self.reader, self.config.training, self.trained.backbone
        status = reader.status()
        batch_size = status.get("global_batch", training.batch_size_per_gpu * training.gradient_accumulation)
        split = methods.split_of(status)
        shape = backbone.embed_dim, backbone.depth, backbone.num_heads
        return RunData(
            level=reader.level(),
            folder="/".join(reader.path.absolute().parts[-2:]),
            lines=reader.log_lines(),
            last=reader.last_metrics(),
            status=status,
            settings=flatten(to_dict(self.config)),
            scores=reader.scores(),
            method=methods.Run(
                to_dict(self.config),
                self.trained.step or 0,
                batch_size,
                *shape,
                split=split,
                segments=self.trained.details.get("segments") or (),
            ),
        )

    def normalise(self) -> Normalise:
        """The function from 8-bit tiles to inputs of a patch-level network."""
        transform = self.trained.transform
        if transform is None:
            raise ConfigError(f"expected a patch-level run, found the region-level run {self.reader.path}")
        return normaliser(transform.mean, transform.std, self.trained.backbone.spec.patch_size)


def load_run(path: Path, level: str) -> LoadedRun:
    """Load the trained and the untrained network of a run.

    Args:
        path: The run folder.
        level: ``patch`` or ``region``.

    Raises:
        CheckpointError: If there is no checkpoint, or no initial one.
        ConfigError: If it is a run of the other level, or its settings are damaged.
    """
    reader = RunReader(path)
    trained = load_backbone_file(reader.checkpoint())
    untrained = load_backbone_file(reader.initial_checkpoint())
    if reader.level() != level:
        raise ConfigError(f"{path}: expected a {level}-level run, found a {reader.level()}-level run; check the path")
    return LoadedRun(reader, reader.config(), trained, untrained)


def crop_data(batch: Batch, crops: ImageCrops) -> CropData:
    """The crops of a batch as images.

    Args:
        batch: Tiles and the parameters of their crops.
        crops: Applies the parameters.
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in (crops.mean, crops.std))
    rows: list[list[np.ndarray]] = [[] for _ in batch.inputs]
    for group in crops.apply(batch.inputs, batch.parameters):  # (V, B, 3, s, s) of each size s
        for view in group * std + mean:
            for row, crop in zip(rows, view, strict=True):
                row.append((crop.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    return CropData([tile.permute(1, 2, 0).numpy() for tile in batch.inputs], rows)


def feature_data(slide: TiledSlide, run: LoadedRun, device: torch.device) -> FeatureData:
    """Features of the slide's tiles by the trained and the untrained network of a patch-level run."""
    tiles, corners, square = slide.map_tiles()
    pixels = slide.read(tiles)
    batches = _to_tensor(pixels).split(BATCH)
    normalise, precision = run.normalise(), run.config.speed.precision
    untrained, trained = (
        embed(network.backbone, batches, normalise, device, precision).numpy()
        for network in (run.untrained, run.trained)
    )
    disjoint = [index for index, tile in enumerate(tiles) if tile.on_lattice]
    return FeatureData(corners, square, untrained, trained, disjoint, [pixels[i] for i in disjoint])


def tile_attention(features: FeatureData, run: LoadedRun, um_per_px: float, device: torch.device) -> AttentionData:
    """Attention of a patch-level run over a few dissimilar tiles."""
    chosen = farthest_points(features.trained[features.disjoint], SHOWN_TILES)
    images = [features.pixels[index] for index in chosen]
    return AttentionData(images, *_attention(run, run.normalise()(_to_tensor(images)), device), um_per_px)


def region_attention(slide: TiledSlide, run: LoadedRun, device: torch.device) -> AttentionData | None:
    """Attention of a region-level run over the shown regions; None if their features have not been extracted."""
    regions, grids = slide.region_grids(getattr(run.config, "grid_order", "yx"), run.trained.grids)
    if grids is None:
        return None
    images = [slide.region_image(region) for region in regions]
    cell_px = images[0].shape[0] / regions[0].grid[0]
    um_per_px = slide.spacing_um * slide.tiling.geometry.tile_size_px / cell_px
    return AttentionData(images, *_attention(run, grids, device), um_per_px)


@torch.inference_mode()
def _attention(run: LoadedRun, inputs: Tensor, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the trained and of the untrained network, (n, heads, h, w) each."""
    patch_size = run.trained.backbone.spec.patch_size
    height, width = (side // patch_size for side in inputs.shape[2:])

    def attention(network: LoadedBackbone) -> np.ndarray:
        weights = network.backbone.to(device).eval().last_attention(inputs.to(device))  # (n, heads, h * w)
        return weights.unflatten(2, (height, width)).cpu().numpy()

    return attention(run.trained), attention(run.untrained)


def _to_tensor(pixels: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()  # (n, 3, S, S)
