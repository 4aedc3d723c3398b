"""What it takes to build a backbone again: plain values that travel with every checkpoint."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dino.errors import CheckpointError, ConfigError
from dino.models.inputs import input_kind

RULES = ("dino", "recomputed", "timm")


@dataclass(frozen=True)
class Shape:
    """Size of a plain vision transformer.

    Attributes:
        dim: Embedding dim D.
        depth: Number of blocks.
        heads: Attention heads.
        registers: Register tokens (Darcet et al. 2023, arXiv 2309.16588).
        layer_scale: First value of LayerScale (Touvron et al. 2021, arXiv 2103.17239), 0 for none.
        no_embed_class: The position table has rows for patches only.
        mlp_ratio: Width of the MLP's first layer over D.
        swiglu: The MLP is SwiGLU (Shazeer 2020, arXiv 2002.05202), whose first layer has gate and value.
    """

    dim: int
    depth: int
    heads: int
    registers: int = 0
    layer_scale: float = 0.0
    no_embed_class: bool = False
    mlp_ratio: float = 4.0
    swiglu: bool = False


SHAPES = {
    "vit_tiny": Shape(192, 12, 3),
    "vit_small": Shape(384, 12, 6),
    "vit_base": Shape(768, 12, 12),
    "vit_large": Shape(1024, 24, 16),
    "hvit_xs": Shape(192, 6, 6),
}


@dataclass(frozen=True)
class BackboneSpec:
    """Everything that decides a backbone but its weights.

    Attributes:
        arch: ``vit_tiny|small|base|large``, ``hvit_xs``, a timm name, or ``vit:dim=64,depth=2,heads=2`` with, where
            wanted, ``registers``, ``layer_scale``, ``mlp_ratio``, ``no_embed_class`` and ``swiglu`` (0 or 1).
        level: ``patch`` (images) or ``region`` (feature grids).
        input_dim: Channels of the input: 3, or the D of the grids.
        img_size: (height, width) in px that the position table is for; level 2: in cells.
        patch_size: Patch size in px; level 2: 1.
        pos_resample: Rule that resizes the position table, see ``RULES``.
    """

    arch: str
    level: str
    input_dim: int
    img_size: tuple[int, int]
    patch_size: int
    pos_resample: str = "dino"

    def __post_init__(self) -> None:
        """Raise ConfigError where the values contradict each other."""
        check_rule(self.pos_resample)
        input_kind(self.level).check_patch_size(self.patch_size)
        if self.patch_size < 1 or min(self.img_size) < 1 or any(side % self.patch_size for side in self.img_size):
            raise ConfigError(
                f"model.patch_size={self.patch_size} must divide the input's sides, found {self.img_size[0]} x "
                f"{self.img_size[1]} px: choose sizes that are multiples of it"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**asdict(self), "img_size": list(self.img_size)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BackboneSpec":
        """The spec that ``to_dict`` wrote; CheckpointError when a value is missing."""
        try:
            known = {field.name: values[field.name] for field in fields(cls)}
            return cls(**{**known, "img_size": (int(values["img_size"][0]), int(values["img_size"][1]))})
        except (KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"the checkpoint's backbone spec is not readable: {error!r}") from error


def shape_of(arch: str) -> Shape | None:
    """Shape of one of this package's architectures; None for any other name.

    Raises:
        ConfigError: ``vit:...`` is not of the form ``vit:dim=64,depth=2,heads=2``.
    """
    if not arch.startswith("vit:"):
        return SHAPES.get(arch)
    types = {field.name: type(getattr(SHAPES["vit_tiny"], field.name)) for field in fields(Shape)}
    casts = {name: (lambda text: bool(int(text))) if kind is bool else kind for name, kind in types.items()}
    try:
        pairs = [pair.split("=") for pair in arch.removeprefix("vit:").split(",")]
        return Shape(**{key.strip(): casts[key.strip()](value) for key, value in pairs})
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"model.arch: expected e.g. vit:dim=64,depth=2,heads=2, found {arch!r} ({error})") from error


def arch_of(shape: Shape, level: str) -> str:
    """The name of ``shape``: a short one where there is one for this level, else ``vit:dim=...``."""
    for name in input_kind(level).short_names:
        if SHAPES[name] == shape:
            return name
    first = Shape(shape.dim, shape.depth, shape.heads)
    extra = {key: value for key, value in asdict(shape).items() if value != getattr(first, key)}
    values = {"dim": shape.dim, "depth": shape.depth, "heads": shape.heads, **extra}
    return "vit:" + ",".join(f"{key}={int(value) if value is True else value}" for key, value in values.items())


def check_rule(rule: str) -> None:
    """Raise ConfigError when ``rule`` is none of ``RULES``."""
    if rule not in RULES:
        raise ConfigError(f"model.pos_resample: expected one of {', '.join(RULES)}, found {rule!r}")


def resampling_matrix(old: tuple[int, int], new: tuple[int, int], rule: str) -> Tensor:
    """Matrix that resizes a table of ``old`` (height, width) tokens to ``new``.

    Every rule is linear in the table, so the matrix is what interpolation makes of the identity. The matrix can be
    cached; its product with the table cannot, while the table trains.

    Args:
        old: Grid that the table was trained for.
        new: Grid that is wanted.
        rule: ``dino``: bicubic without antialias, the scale (n + 0.1) / n0 taken as given (facebookresearch/dino and
            HIPT). ``recomputed``: the same with the scale n / n0 of the sizes. ``timm``: bicubic with antialias.

    Returns:
        float64 tensor (new tokens, old tokens) on the CPU, both row-major.

    Raises:
        ConfigError: The rule is unknown.
    """
    check_rule(rule)
    tokens = old[0] * old[1]
    identity = torch.eye(tokens, dtype=torch.float64).reshape(1, tokens, *old)
    if tuple(old) == tuple(new):
        return identity.reshape(tokens, tokens)
    if rule == "dino":
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        resized = F.interpolate(identity, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        resized = F.interpolate(identity, size=new, mode="bicubic", align_corners=False, antialias=rule == "timm")
    return resized.reshape(tokens, new[0] * new[1]).T.contiguous()
