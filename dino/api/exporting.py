"""Models for use elsewhere: exports that timm loads, modules to call, and the description of a checkpoint."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dino.config.schema import ExportConfig
from dino.files import oserror_to_data_error
from dino.models.backbone import Backbone, BackboneSpec
from dino.models.export import export_backbone
from dino.models.grid_source import KEY, recorded
from dino.models.inputs import input_kind
from dino.models.sharing import identifying
from dino.models.transforms import Transform
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.privacy import count
from dino.progress import say


class ClsFeatures(nn.Module):
    """A backbone that maps its input to the cls token after the final norm.

    Args:
        loaded: The backbone and its transform.

    Attributes:
        backbone: The backbone.
        transform: Mean and std to normalize images with; None for feature grids.
        spec: Architecture, level, dims.
    """

    def __init__(self, loaded: LoadedBackbone) -> None:
        super().__init__()
        self.backbone: Backbone = loaded.backbone
        self.transform: Transform | None = loaded.transform
        self.spec: BackboneSpec = loaded.backbone.spec

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), or feature grids (B, D_in, h, w), to features (B, D).

        Any size that is a multiple of the patch size. Raises ConfigError where the shape does not fit.
        """
        return self.backbone(x, cls_only=True).cls


def load_backbone(source: str | Path, arch: str | None = None, transform: str = "auto") -> ClsFeatures:
    """A trained backbone, in eval mode and float32 on the CPU.

    Args:
        source: A run folder, a checkpoint (own or external), an export, or ``timm:NAME``.
        arch: Architecture of an external checkpoint, where its number of heads is not dim / 64 (level 2: 6).
        transform: ``auto``, ``imagenet``, ``hipt`` or ``timm``, for ``.transform`` of the result.

    Raises:
        CheckpointError: The source is missing, damaged or unsafe, or its tensors do not fit.
        ConfigError: ``arch`` or ``transform`` does not fit.
    """
    return ClsFeatures(load_backbone_file(source, arch, transform)).eval()


def export(source: str, directory: Path, config: ExportConfig) -> Path:
    """Write the teacher's backbone as a folder for ``timm.create_model("local-dir:DIR", pretrained=True)``.

    Args:
        source: As in ``load_backbone``.
        directory: Folder to write ``config.json`` and ``model.safetensors`` into.
        config: Transform to record, the tile size that the position table is resized to, and whether ids are written.

    Returns:
        ``directory``.

    Raises:
        CheckpointError: The source is missing, damaged or unsafe, or its tensors do not fit.
        ConfigError: The patch size does not divide the tile size, or the source has no ids to write.
        DataError: The disk does not take what is written.
    """
    loaded = load_backbone_file(source, config.arch, config.transform)
    with oserror_to_data_error(Path(directory)):
        export_backbone(loaded, Path(directory), config.tile_size_px, ids=config.ids)
    needs = input_kind(loaded.level).export_needs
    say(f'wrote {directory}: {needs}timm.create_model("local-dir:{directory}", pretrained=True, num_classes=0)')
    return Path(directory)


def info(source: str, arch: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint in plain values; the arguments are those of ``load_backbone``.

    Returns:
        Kind, level, architecture, dims, parameter count, transform, spacing (µm/px), tile size (px), steps, what the
        file tells about slides, patients and folders (``contains``), settings of the run, fingerprint of the weights,
        and unexpected keys (``left_over``); None where unknown.

    Raises:
        CheckpointError: The source is missing, damaged or unsafe, or its tensors do not fit.
    """
    loaded = load_backbone_file(source, arch)
    backbone, spec = loaded.backbone, loaded.backbone.spec
    return {
        "source": loaded.source,
        "kind": "trained by histodino" if loaded.own else "external",
        "level": loaded.level,
        "arch": spec.arch,
        "input_dim": spec.input_dim,
        "embed_dim": backbone.embed_dim,
        "depth": backbone.depth,
        "num_heads": backbone.num_heads,
        "patch_size": spec.patch_size,
        "position_table": list(backbone.vit.patch_embed.grid_size),
        "pos_resample": spec.pos_resample,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "transform": loaded.transform.to_dict() if loaded.transform else None,
        "spacing_um": loaded.spacing_um,
        "spacings_um": list(loaded.spacings_um),
        "tile_size_px": loaded.tile_size_px,
        "region_cells": list(loaded.region_cells) if loaded.region_cells else None,
        "step": loaded.step,
        "total_steps": loaded.details.get("total_steps"),
        "segments": loaded.details.get("segments"),
        "versions": loaded.details.get("versions"),
        **({KEY: recorded(loaded.grids)} if not input_kind(loaded.level).normalized else {}),
        "training_slides": count(loaded.details.get("training_slides") or {}, "slide") or None,
        "contains": identifying(loaded.details, loaded.config),
        "fingerprint": loaded.fingerprint,
        "left_over": loaded.report.unexpected,
        "config": loaded.config,
    }
