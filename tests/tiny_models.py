"""Networks and checkpoints for tests: small enough to run in milliseconds."""

from pathlib import Path

import torch
from torch import nn

from dino.models.backbone import BackboneSpec, Tokens, build_backbone
from dino.models.transforms import Transform
from dino.models.weights import LoadedBackbone, LoadReport


class MeanColour(nn.Module):
    """Replacement of a backbone: the feature of a tile is its mean colour. Counts the tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.spec = BackboneSpec("vit:dim=3,depth=1,heads=1", "patch", 3, (32, 32), 16)
        self.embed_dim = 3
        self.seen = 0

    def forward(self, x: torch.Tensor, cls_only: bool = False) -> Tokens:
        self.seen += len(x)
        return Tokens(x.mean((2, 3)) * self.weight)


def mean_colour(fingerprint: str = "mean colour") -> LoadedBackbone:
    """:class:`MeanColour` as a loaded backbone; its features are in [0, 255]."""
    transform = Transform("none", (0.0, 0.0, 0.0), (1 / 255,) * 3)
    report = LoadReport(0, [], [])
    return LoadedBackbone(MeanColour(), transform, "patch", report, "mean.pt", fingerprint=fingerprint)  # type: ignore[arg-type]


def save_checkpoint(path: Path, level: str = "patch", input_dim: int = 3, seed: int = 0, **extra: object) -> Path:
    """Write a checkpoint of this package: a ViT of D=16, with 16 px tokens at level 1."""
    patch = 16 if level == "patch" else 1
    side = 32 if level == "patch" else 4
    spec = BackboneSpec("vit:dim=16,depth=1,heads=2", level, input_dim, (side, side), patch)
    backbone = build_backbone(spec, seed)
    content = {
        "format": "histodino/1",
        "level": level,
        "step": 7,
        "spec": spec.to_dict(),
        "transform": {"name": "hipt", "mean": [0.5] * 3, "std": [0.5] * 3} if level == "patch" else None,
        "teacher": {f"backbone.{name}": tensor for name, tensor in backbone.vit.state_dict().items()},
        **extra,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path
