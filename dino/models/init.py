"""How DINO starts a linear layer."""

import torch
from torch import nn


@torch.no_grad()
def init_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    """Weights from a normal of std 0.02 cut at +-2, bias 0 (facebookresearch/dino, backbone and head alike)."""
    nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
