"""The projection head of DINO, with a weight-normalised last layer that never stores its normalised weight."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino.models.checkpoint import read_checkpoint, readable

SMALLEST_NORM = 1e-12
ROWS = 4096  # rows of the weight that the backward pass works on at a time: what it needs for them stays in cache


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


def head_of(state: Mapping[str, Tensor], prefix: str) -> DINOHead | None:
    """The head in a state dict of this package or of facebookresearch/dino, in eval mode; its shape is the tensors'.

    Args:
        state: Tensors by name.
        prefix: Name of the head, ``head.``; wrappers' ``module.`` may precede it.

    Returns:
        None if the state dict has no such head.

    Raises:
        RuntimeError: Its tensors are not those of a head.
    """
    names = {name: name.removeprefix("module.") for name in state}
    own = {name.removeprefix(prefix): state[found] for found, name in names.items() if name.startswith(prefix)}
    if not {"mlp.0.weight", "last_layer.weight_v"} <= own.keys():
        return None
    (hidden_dim, in_dim), (out_dim, bottleneck_dim) = own["mlp.0.weight"].shape, own["last_layer.weight_v"].shape
    head = DINOHead(in_dim, out_dim, hidden_dim, bottleneck_dim, use_bn="mlp.1.weight" in own)
    head.load_state_dict(own)
    return head.eval()


def load_head(path: Path) -> DINOHead | None:
    """The teacher's head in a checkpoint, in eval mode; None where there is none, as in exports and timm's models.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    if not path.is_file():
        return None
    content = read_checkpoint(path)
    state = content.get("teacher", content)
    with readable(str(path)):
        return head_of(state, "head.")


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows have a length of their own: w = g v / |v| (Salimans & Kingma 2016).

    DINO's has far more rows than its batch has views, so that not the weight but the result is scaled by g / |v|.

    Args:
        in_dim: Dim of the input.
        out_dim: Number of rows.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_dim) -> (N, out_dim)."""
        return _WeightNormLinear.apply(x, self.weight_g, self.weight_v)


class _WeightNormLinear(torch.autograd.Function):
    """Value and gradient in few passes over the weight, without a second tensor of the result's size.

    With ``s = g / |v|``, ``y = (x v^T) s``, and ``dw = dy^T x`` from the gradient ``dy``::

        dx = (dy s) v        dg = (v . dw) / |v|        dv = s (dw - v (v . dw) / |v|^2)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min_(SMALLEST_NORM)  # (K, 1)
        ctx.save_for_backward(x, g, v, norms)
        return F.linear(x, v).mul_((g / norms).T)  # (N, K)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        (dy,) = grads  # (N, K)
        x, g, v, norms = ctx.saved_tensors
        scale = g / norms  # (K, 1)
        dx, dg, dv = torch.zeros_like(x), torch.empty_like(g), torch.empty_like(v)
        for first in range(0, len(v), ROWS):
            part = slice(first, first + ROWS)
            of_rows = dy[:, part]
            dx.addmm_(of_rows * scale[part].T, v[part])
            dw = torch.mm(of_rows.T, x, out=dv[part])  # (k, in_dim)
            along = torch.linalg.vecdot(v[part], dw)[:, None] / norms[part]  # (k, 1)
            dg[part] = along
            dw.addcmul_(v[part], along / norms[part], value=-1).mul_(scale[part])
        return dx, dg if ctx.needs_input_grad[1] else None, dv


@torch.no_grad()
def init_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    """Weights from a normal of std 0.02 cut at +-2, bias 0 (facebookresearch/dino, backbone and head alike)."""
    nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
