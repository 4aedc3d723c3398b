"""A plain vision transformer and DINO head, under the parameter names of facebookresearch/dino.

Sources: Dosovitskiy et al. 2020, arXiv 2010.11929 (the transformer); Caron et al. 2021, arXiv 2104.14294 (the head);
Chen et al. 2022, arXiv 2206.02647 (tokens from a feature grid). Attention is written out, every block computes every
token, and the position table is interpolated anew in each forward.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

MARGIN = 0.1  # facebookresearch/dino adds it to the wanted size, against rounding


class Attention(nn.Module):
    """Multi-head self-attention, softmax and all."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        mixed = scores.softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PatchEmbed(nn.Module):
    """Tokens of an image by a convolution, or of a feature grid by a linear layer and a GELU."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels, dim) if patch == 1 else nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        if self.patch == 1:
            return F.gelu(self.proj(x.flatten(2).transpose(1, 2)))
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A vision transformer that returns its cls token.

    Args:
        channels: Channels of the input.
        side: Side of the input that the position table is for, in px or cells.
        patch: Side of a token; 1 for feature grids.
        dim: Width.
        depth: Blocks.
        heads: Attention heads.
    """

    def __init__(self, channels: int, side: int, patch: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch, self.native = patch, side // patch
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.native**2, dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        return self.tokens(self.patch_embed(x), x)[:, 0]

    def tokens(self, patches: Tensor, x: Tensor) -> Tensor:
        """All tokens, (B, 1 + N, D), of the embedded patches (B, N, D) of ``x``."""
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)
        tokens = tokens + self.positions(x.shape[-2] // self.patch, x.shape[-1] // self.patch)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def positions(self, height: int, width: int) -> Tensor:
        """The position table for a grid of tokens, (1, 1 + height * width, D)."""
        if height == width == self.native:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (self.native, self.native)).permute(0, 3, 1, 2)
        scale = ((height + MARGIN) / self.native, (width + MARGIN) / self.native)
        table = F.interpolate(table, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)


class Head(nn.Module):
    """MLP, l2 normalisation and a weight-normalised last layer."""

    def __init__(self, dim: int, out_dim: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        layers = [
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        ]
        self.mlp = nn.Sequential(*layers)
        self.last_layer = parametrizations.weight_norm(nn.Linear(bottleneck, out_dim, bias=False), dim=0)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, D) -> (N, K)."""
        return self.last_layer(F.normalize(self.mlp(tokens), dim=-1))


class MultiCrop(nn.Module):
    """A backbone over views of several sizes, one size at a time, and the head once over all of them."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """V tensors (B, C, s, s) -> (V * B, K), view after view."""
        runs = [torch.cat(list(run)) for _, run in groupby(views, key=lambda view: view.shape[-1])]
        return self.head(torch.cat([self.backbone(run).float() for run in runs]))
