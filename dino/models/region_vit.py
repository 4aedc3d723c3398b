"""The region ViT: a vision transformer whose tokens are the cells of a feature grid (HIPT's ViT-S/4096_256).

Source: Chen et al. 2022, arXiv 2206.02647, section 3.2. It is timm's ``VisionTransformer`` with another embedding.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dino.errors import ConfigError

GRID = 14  # HIPT's table: global crops of a 16 x 16 grid are 14 x 14

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
        place = {key: factory.get(key) for key in ("device", "dtype")}
        self.proj = nn.Linear(in_chans, embed_dim, bias=bias, **place)

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


@register_model
def hvit_xs(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """HIPT's region ViT, 6 blocks of 192 with 6 heads, for timm; any argument can be given another value."""
    args = {"img_size": GRID, "patch_size": 1, "in_chans": 384, "embed_dim": 192, "depth": 6, "num_heads": 6}
    args |= {"num_classes": 0, "embed_layer": GridEmbed}
    # No filter function: timm's own expects a convolution, and would resize the table behind the user's back.
    return build_model_with_cfg(VisionTransformer, "hvit_xs", pretrained, **{**args, **kwargs})
