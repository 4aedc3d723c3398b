"""The seam between models and everything else: images or feature grids in, named tokens out."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dino.errors import ConfigError
from dino.models.blocks import as_keep, attention_weights, run_block
from dino.models.position import resampling_matrix
from dino.models.runners import BlockRunner
from dino.models.spec import BackboneSpec
from dino.models.vit import check_supported, init_weights, make_vit

__all__ = ["Backbone", "BackboneSpec", "Tokens", "build_backbone"]

CLS = frozenset({"cls"})
KNOWN = frozenset({"cls", "patches"})


@dataclass
class Tokens:
    """What a backbone returns, after its final norm.

    Attributes:
        cls: (B, D).
        registers: (B, R, D); None where there are none or they were not asked for.
        patches: (B, N, D), row-major; None where not asked for.
    """

    cls: Tensor
    registers: Tensor | None = None
    patches: Tensor | None = None


class Backbone(nn.Module):
    """A timm vision transformer with its own forward pass.

    The differences: inputs of any fitting size with the position table resized by the spec's rule, drop-path as given
    multipliers, and a last block for the cls token alone where nothing else is needed. Parameters live in ``vit``,
    under the names of facebookresearch/dino.

    Args:
        spec: What to build.
        vit: The transformer, where it exists already; made from ``spec`` otherwise.

    Attributes:
        run_block: How each block is run (see :mod:`dino.models.runners`).

    Raises:
        ConfigError: The architecture is unknown or not supported.
    """

    vit: Any  # a timm VisionTransformer, whose optional parts type checkers cannot follow

    def __init__(self, spec: BackboneSpec, vit: nn.Module | None = None) -> None:
        super().__init__()
        if vit is not None:
            check_supported(vit, spec.arch)
        self.vit = make_vit(spec) if vit is None else vit
        self.spec = spec
        self.embed_dim: int = self.vit.embed_dim
        self.depth = len(self.vit.blocks)
        self.num_heads: int = self.vit.blocks[0].attn.num_heads
        self.run_block: BlockRunner = run_block
        self._matrices: dict[tuple, Tensor] = {}

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        masked: Tensor | None = None,
        need: Set[str] = CLS,
        keep: Tensor | None = None,
    ) -> Tokens:
        """Tokens of images or grids.

        Args:
            x: (B, 3, H, W) normalised images, or (B, D_in, h, w) feature grids.
            valid: Which cells exist; must be None today, and is here for ragged grids.
            masked: Which tokens are masked; must be None today, and is here for masked objectives.
            need: ``{"cls"}``, or ``{"cls", "patches"}`` for all tokens.
            keep: (B, depth, 2) multipliers of the residual branches, 0 or 1 / (1 - p) (stochastic depth, Huang et al.
                2016, arXiv 1603.09382); None for 1.

        Returns:
            The tokens asked for.

        Raises:
            ConfigError: The input does not fit, or something is asked for that this backbone cannot give.
        """
        if valid is not None or masked is not None or not need <= KNOWN:
            raise ConfigError(f"a ViT gives {sorted(KNOWN)} of whole, unmasked inputs, asked for {sorted(need)}")
        tokens = self.embed(x)
        keeps = as_keep(keep, tokens, self.depth)
        cls_only = "patches" not in need
        for index, block in enumerate(self.vit.blocks):
            last = index == self.depth - 1
            tokens = self.run_block(block, tokens, keeps[index], 1 if last and cls_only else None)
        tokens = self.vit.norm(tokens)  # (B, 1 or 1 + R + N, D)
        if cls_only:
            return Tokens(tokens[:, 0])
        prefix = self.vit.num_prefix_tokens
        return Tokens(tokens[:, 0], tokens[:, 1:prefix] if prefix > 1 else None, tokens[:, prefix:])

    def last_attention(self, x: Tensor) -> Tensor:
        """Attention of the cls token over the patch tokens in the last block.

        Args:
            x: As in ``forward``.

        Returns:
            (B, heads, N); a row sums to 1 less what cls token and registers get.
        """
        tokens = self.embed(x)
        *body, last = self.vit.blocks
        for block in body:
            tokens = run_block(block, tokens)
        weights = attention_weights(last.attn, last.norm1(tokens), first=1)  # (B, heads, 1, 1 + R + N)
        return weights[:, :, 0, self.vit.num_prefix_tokens :]

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + R + N, D) that enter the first block."""
        self._check(x)
        vit = self.vit
        patches = vit.patch_embed(x)  # (B, h, w, D)
        positions = self.positions((patches.shape[1], patches.shape[2]))
        patches = patches.flatten(1, 2)  # (B, N, D)
        given = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.no_embed_class:
            tokens = torch.cat([*given, patches + positions], dim=1)
        else:
            tokens = torch.cat([*given, patches], dim=1) + positions
        return vit.norm_pre(tokens)

    def positions(self, size: tuple[int, int]) -> Tensor:
        """The position table (1, rows, D) for a grid of ``size`` tokens; gradients reach the trained table."""
        table = self.vit.pos_embed
        native = tuple(self.vit.patch_embed.grid_size)
        if size == native:
            return table
        prefix = 0 if self.vit.no_embed_class else self.vit.num_prefix_tokens
        with torch.autocast(table.device.type, enabled=False):  # bf16 would round what is learned in small steps
            resized = self._matrix(native, size, table) @ table[0, prefix:]
        return torch.cat([table[:, :prefix], resized[None]], dim=1)

    def _matrix(self, native: tuple[int, int], size: tuple[int, int], table: Tensor) -> Tensor:
        key = (native, size, table.device, table.dtype)
        if key not in self._matrices:
            # A matrix first made under inference_mode would be unusable in the next training step.
            with torch.inference_mode(False), torch.no_grad():
                matrix = resampling_matrix(native, size, self.spec.pos_resample)
                self._matrices[key] = matrix.to(device=table.device, dtype=table.dtype)
        return self._matrices[key]

    def _check(self, x: Tensor) -> None:
        expected = "feature grids (B, D, h, w)" if self.spec.level == "region" else "images (B, C, H, W)"
        if x.ndim != 4 or x.shape[1] != self.spec.input_dim:
            raise ConfigError(f"expected {expected} of dim {self.spec.input_dim}, found {tuple(x.shape)}")
        if x.shape[2] % self.spec.patch_size or x.shape[3] % self.spec.patch_size:
            raise ConfigError(
                f"patch size {self.spec.patch_size} must divide the image, found {x.shape[2]} x {x.shape[3]} px: "
                "choose a size that is a multiple of it"
            )


def build_backbone(spec: BackboneSpec, seed: int) -> Backbone:
    """A backbone with DINO's starting weights; the same seed gives the same weights.

    Neither reads nor moves torch's global generators.

    Args:
        spec: What to build.
        seed: Seed of the weights.

    Raises:
        ConfigError: The architecture is unknown or not supported, or a size does not fit.
    """
    with torch.random.fork_rng(devices=[]):  # timm draws while it builds
        backbone = Backbone(spec)
    init_weights(backbone.vit, torch.Generator().manual_seed(seed))
    return backbone
