"""HIPT's aggregation over the regions of a slide: a small transformer, then gated attention."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino.config.schema import HiptConfig
from dino.evaluate.abmil import Dropout, GatedAttention, Piece, initial_weights, linear, unchanged
from dino.evaluate.statistics import Values


class RegionTransformer(GatedAttention):
    """A network with self-attention and then gated attention over all instances of a bag.

    The slide level of HIPT (Chen et al. 2022, "Scaling vision transformers to gigapixel images via hierarchical
    self-supervised learning", arXiv 2206.02647, section 3.3, and ``HIPT_LGP_FC`` of its code): the features of regions
    x_k are embedded as h_k = ReLU(E x_k); transformer layers without positions ::

        h <- LayerNorm(h + SelfAttention(h)),    h <- LayerNorm(h + W_2 ReLU(W_1 h))

    follow, then the gated attention z = sum over k of a_k h_k of :class:`~dino.evaluate.abmil.GatedAttention`, and the
    output is a linear function of ReLU(R z). As there, dropout follows every ReLU and both sums in a layer, but the
    attention itself has none, and inputs are standardised.

    All instances are in memory at once, which self-attention needs; the N x N attention is not (fused kernel). The time
    grows with the square of their number.

    Args:
        mean: ``(D,)`` subtracted from instances.
        deviation: ``(D,)`` that they are divided by.
        outputs: Number of outputs K.
        config: Widths, layers and heads.
        seed: Seed of the initial weights.
    """

    def __init__(self, mean: Values, deviation: Values, outputs: int, config: HiptConfig, seed: int) -> None:
        super().__init__(mean, deviation, outputs, config, seed)
        generator = initial_weights(seed, "hipt weights")
        self.layers = nn.ModuleList(_Layer(config.hidden, config.heads, generator) for _ in range(config.layers))
        self.rho = linear(config.hidden, config.hidden, generator)

    def forward(self, pieces: Sequence[Piece], dropout: Dropout = unchanged) -> Tensor:
        """Outputs ``(K,)`` for one bag.

        Args:
            pieces: Functions that give its instances, each ``(n, D)``.
            dropout: Applied where the network has dropout.
        """
        hidden = torch.cat([self.embedded(piece()) for piece in pieces])  # (N, hidden)
        hidden = dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, dropout)
        bag = self.scores(hidden).softmax(0) @ hidden  # (hidden,)
        return self.head(dropout(F.relu(self.rho(bag))))


class _Layer(nn.Module):
    """A transformer layer, normalised after each sum (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = linear(width, 3 * width, generator), linear(width, width, generator)
        self.fc1, self.fc2 = linear(width, width, generator), linear(width, width, generator)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, dropout: Dropout) -> Tensor:
        """``(N, width)`` to the same."""
        query, key, value = (
            self.qkv(x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)[:, None]
        )  # (1, heads, N, d)
        mixed = F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(1)  # (N, width)
        x = self.norm1(x + dropout(self.proj(mixed)))
        return self.norm2(x + dropout(self.fc2(dropout(F.relu(self.fc1(x))))))
