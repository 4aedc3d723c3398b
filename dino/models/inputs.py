"""Kinds of input that a backbone reads: images (level 1) and feature grids (level 2).

A level differs from another in its embedding layer, in what a spec may say, and in what an export needs. All of that
is one :class:`InputKind`; a further level is a further entry of :data:`INPUTS`.

Importing this module registers the region architecture with timm.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dino.errors import ConfigError

if TYPE_CHECKING:  # a spec refers to its kind of input
    from dino.models.spec import BackboneSpec

GRID = 14  # HIPT's table: global crops of a 16 x 16 grid are 14 x 14
TILE_SIZE_PX = 256

default_cfgs = generate_default_cfgs(
    {"hvit_xs": {"input_size": (384, GRID, GRID), "num_classes": 0, "classifier": "head", "first_conv": None}}
)


class GridEmbed(nn.Module):
    """Tokens of a feature grid: Linear D_in -> D, then GELU, cell by cell.

    Takes the arguments that timm gives to an ``embed_layer``. A cell is a token, so ``patch_size`` is 1.

    Args:
        img_size: (h, w) in cells that the position table is for, or one side of a square.
        patch_size: 1.
        in_chans: D_in, dim of the grid's features.
        embed_dim: D, dim of the tokens.
        bias: Whether the linear layer has a bias.
        output_fmt: ``NHWC`` to keep the grid, None for a sequence.
        strict_img_size: Whether only ``img_size`` is accepted.
        factory: ``device`` and ``dtype``; timm's other arguments have no meaning for grids.

    Raises:
        ConfigError: ``patch_size`` is not 1.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = GRID,
        patch_size: int = 1,
        in_chans: int = 384,
        embed_dim: int = 192,
        bias: bool = True,
        output_fmt: str | None = None,
        strict_img_size: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        if patch_size != 1:
            raise ConfigError(f"patch_size: a token of a feature grid is one cell: expected 1, found {patch_size}")
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.grid_size = self.img_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.patch_size = (1, 1)
        self.flatten = output_fmt is None
        self.strict_img_size = strict_img_size
        options = {key: factory.get(key) for key in ("device", "dtype")}
        self.proj = nn.Linear(in_chans, embed_dim, bias=bias, **options)

    def feat_ratio(self) -> int:
        """Cells per token along an axis."""
        return 1

    def forward(self, grids: Tensor) -> Tensor:
        """Embed grids (B, D_in, h, w) as tokens (B, h * w, D), row-major, or (B, h, w, D).

        Raises:
            ConfigError: The grid is not of ``img_size`` although that is strict.
        """
        if self.strict_img_size and tuple(grids.shape[-2:]) != self.img_size:
            raise ConfigError(f"expected grids of {self.img_size} cells, found {tuple(grids.shape[-2:])}")
        tokens = F.gelu(self.proj(grids.permute(0, 2, 3, 1)))  # (B, h, w, D)
        return tokens.flatten(1, 2) if self.flatten else tokens


class InputKind:
    """What is specific to one kind of input; this class describes images, as timm's models read them.

    Attributes:
        name: Name of the level, in specs, checkpoints and messages.
        description: The input in words.
        shape: Its shape in words.
        normalized: Whether pixels are normalized first, so that a checkpoint has a transform.
        timm_arguments: Additional arguments of timm's ``VisionTransformer``.
        short_names: Architectures of this package that are named after this kind of input.
        default_entry: timm architecture that an export names where it has no name of its own; all arguments are given
            with it.
        first_conv: Name of the first convolution, for timm.
        export_needs: What a program imports before timm can load an export.
    """

    name = "patch"
    description = "images (level 1)"
    shape = "images (B, C, H, W)"
    normalized = True
    timm_arguments: ClassVar[dict[str, Any]] = {}
    short_names: tuple[str, ...] = ("vit_tiny", "vit_small", "vit_base", "vit_large")
    default_entry = "vit_small_patch16_224"
    first_conv: str | None = "patch_embed.proj"
    export_needs = ""

    def matches(self, weight: Tensor) -> bool:
        """Whether ``weight`` of an embedding layer is of this kind: here (D, C, p, p)."""
        return weight.ndim == 4

    def patch_size(self, weight: Tensor) -> int:
        """Patch size of an embedding layer, from its weight."""
        return weight.shape[-1]

    def num_heads(self, dim: int) -> int | None:
        """Number of heads of the published models of width ``dim``; None where ``dim`` does not determine it."""
        return None if dim % 64 else dim // 64

    def check_patch_size(self, patch_size: int) -> None:
        """Raise ConfigError for a patch size that this kind of input cannot have."""

    def check_arch(self, arch: str) -> None:
        """Raise ConfigError for an architecture that reads another kind of input."""
        if arch.startswith("hvit"):
            raise ConfigError(f"model.arch: {arch} reads feature grids; for images use e.g. vit_small")

    def check_input(self, x: Tensor, spec: "BackboneSpec") -> None:
        """Raise ConfigError where the shape of ``x`` does not fit a backbone of ``spec``."""
        if x.ndim != 4 or x.shape[1] != spec.input_dim:
            raise ConfigError(f"expected {self.shape} of dim {spec.input_dim}, found {tuple(x.shape)}")
        if x.shape[2] % spec.patch_size or x.shape[3] % spec.patch_size:
            raise ConfigError(
                f"patch size {spec.patch_size} must divide the image, found {x.shape[2]} x {x.shape[3]} px: "
                "choose a size that is a multiple of it"
            )

    def export_entry(self, arch: str) -> str:
        """The timm architecture that an export of one of this package's architectures names."""
        return f"{arch}_patch16_224" if arch in self.short_names else self.default_entry

    def export_size(
        self, spec: "BackboneSpec", tile_size_px: int | None, region_cells: Sequence[int] | None
    ) -> tuple[int, int]:
        """Input size (height, width) that the position table of an export is made for.

        Args:
            spec: The backbone's.
            tile_size_px: Size of the tiles in px, as the user gives it; None for 256 px, or the largest multiple of the
                patch size below.
            region_cells: (height, width) of the grids in cells, where the checkpoint contains it.

        Raises:
            ConfigError: The patch size does not divide ``tile_size_px``.
        """
        side = spec.patch_size
        if tile_size_px is None:
            tile_size_px = max(side, TILE_SIZE_PX - TILE_SIZE_PX % side)
        if tile_size_px < side or tile_size_px % side:
            below = max(0, tile_size_px - tile_size_px % side)
            near = " or ".join(str(size) for size in (below, below + side) if size > 0)
            raise ConfigError(
                f"tile_size_px: expected a multiple of the patch size {side}, found {tile_size_px}: choose {near}"
            )
        return (tile_size_px, tile_size_px)


class GridInput(InputKind):
    """Feature grids: a token is one cell."""

    name = "region"
    description = "feature grids (level 2)"
    shape = "feature grids (B, D, h, w)"
    normalized = False
    timm_arguments: ClassVar[dict[str, Any]] = {"embed_layer": GridEmbed}
    short_names = ("hvit_xs",)
    default_entry = "hvit_xs"
    first_conv = None
    export_needs = "import dino; "

    def matches(self, weight: Tensor) -> bool:
        """As :meth:`InputKind.matches`: here (D, D_in)."""
        return weight.ndim == 2

    def patch_size(self, weight: Tensor) -> int:
        """As :meth:`InputKind.patch_size`."""
        return 1

    def num_heads(self, dim: int) -> int | None:
        """As :meth:`InputKind.num_heads`: HIPT's region ViT has 6."""
        return None if dim % 6 else 6

    def check_patch_size(self, patch_size: int) -> None:
        """As :meth:`InputKind.check_patch_size`."""
        if patch_size != 1:
            raise ConfigError(f"model.patch_size: a token of level 2 is one cell: expected 1, found {patch_size}")

    def check_arch(self, arch: str) -> None:
        """As :meth:`InputKind.check_arch`."""
        other = not arch.startswith("vit:") or "swiglu" in arch
        if arch not in (*self.short_names, *InputKind.short_names) and other:
            expected = "hvit_xs, vit_tiny, vit_small, vit_base, vit_large or vit:dim=...,depth=...,heads=..."
            raise ConfigError(f"model.arch: level 2 takes {expected}, found {arch!r}")

    def export_entry(self, arch: str) -> str:
        """As :meth:`InputKind.export_entry`."""
        return self.default_entry

    def export_size(
        self, spec: "BackboneSpec", tile_size_px: int | None, region_cells: Sequence[int] | None
    ) -> tuple[int, int]:
        """As :meth:`InputKind.export_size`: the grids trained on, or 16 x 16 tiles of 256 px in 4096 px."""
        height, width = region_cells or (16, 16)
        return (height, width)


INPUTS = {kind.name: kind for kind in (InputKind(), GridInput())}


def input_kind(level: str) -> InputKind:
    """The kind of input of a level; ConfigError when there is no such level."""
    if level not in INPUTS:
        raise ConfigError(f"level: expected {' or '.join(INPUTS)}, found {level!r}")
    return INPUTS[level]


@register_model
def hvit_xs(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """HIPT's region ViT, 6 blocks of 192 with 6 heads, for timm; any argument can be given another value."""
    args = {"img_size": GRID, "patch_size": 1, "in_chans": 384, "embed_dim": 192, "depth": 6, "num_heads": 6}
    args |= {"num_classes": 0, "embed_layer": GridEmbed}
    # No filter function: timm's own expects a convolution, and would resize the table behind the user's back.
    return build_model_with_cfg(VisionTransformer, "hvit_xs", pretrained, **{**args, **kwargs})
