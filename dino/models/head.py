"""The projection head of DINO."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino.models.init import init_linear
from dino.models.weight_norm import WeightNormLinear


class DINOHead(nn.Module):
    """MLP, l2 normalisation, and a weight-normalised last layer (Caron et al. 2021, arXiv 2104.14294, appendix C).

    Parameters are named as in facebookresearch/dino: ``mlp.{0,2,4}``, ``last_layer.weight_g`` (K, 1) and
    ``last_layer.weight_v`` (K, bottleneck).

    Args:
        in_dim: Dim D of the backbone's tokens.
        out_dim: Number of prototypes K.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width of the normalised bottleneck.
        use_bn: Batch normalisation after the hidden linear layers.
        norm_last_layer: Keep ``weight_g`` fixed at 1.
        seed: Seed of the starting weights; torch's global generators are neither read nor moved.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            norms = [[nn.BatchNorm1d(hidden_dim)] if use_bn else [] for _ in range(2)]
            self.mlp = nn.Sequential(
                *[nn.Linear(in_dim, hidden_dim), *norms[0], nn.GELU()],
                *[nn.Linear(hidden_dim, hidden_dim), *norms[1], nn.GELU()],
                nn.Linear(hidden_dim, bottleneck_dim),
            )
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)
        generator = torch.Generator().manual_seed(seed)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                init_linear(layer, generator)
        bound = bottleneck_dim**-0.5  # torch's own start of a linear layer, which DINO leaves to this one
        nn.init.uniform_(self.last_layer.weight_v, -bound, bound, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, K) of tokens (N, D): float32 also under autocast, float64 for float64 input."""
        hidden = self.mlp(tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            # A bf16 logit near 1 errs by 0.002, which the teacher's temperature of 0.04 turns into 0.05.
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            return self.last_layer(F.normalize(hidden, dim=-1))
