"""The predictor of masked features: a small transformer on the student's patch tokens."""

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from dino.models.blocks import Block
from dino.models.head import init_linear

HEAD_DIM = 64  # smallest number of channels of an attention head


class Predictor(nn.Module):
    """Pre-norm transformer blocks between two linear layers (Assran et al. 2023, arXiv 2301.08243, section 3).

    It sees all patch tokens of a view, masked and visible ones. It has no position embeddings: the mask tokens got
    theirs in the student, so that views of any size fit.

    Args:
        dim: Dimension D of the student's and the teacher's tokens.
        width: Dimension of the blocks, with as many attention heads of at least 64 channels as divide it.
        depth: Number of blocks.
        seed: Seed of the initial weights; torch's global generators are neither read nor changed.
    """

    def __init__(self, dim: int, width: int, depth: int = 4, seed: int = 0) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        heads = max(count for count in range(1, max(1, width // HEAD_DIM) + 1) if width % count == 0)
        with torch.random.fork_rng(devices=[]):  # torch and timm draw while they build
            self.embed = nn.Linear(dim, width)
            blocks = [TimmBlock(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
            self.proj = nn.Linear(width, dim)
        self.blocks = nn.ModuleList([Block(block) for block in blocks])
        self.norm = norm(width)
        generator = torch.Generator().manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                init_linear(layer, generator)

    def forward(self, patches: Tensor, index: Tensor) -> Tensor:
        """Predicted features of some of the tokens.

        Args:
            patches: (n, N, D) patch tokens of n views.
            index: (M,) which of the n * N tokens to predict.

        Returns:
            (M, D).
        """
        tokens = self.embed(patches)
        for block in self.blocks:
            tokens = block(tokens)  # (n, N, width)
        return self.proj(self.norm(tokens.flatten(0, 1)[index]))
