"""A linear layer with weight normalisation that never writes its normalised weight down."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_NORM = 1e-12
ROWS = 4096  # rows of the weight that the backward pass works on at a time: what it needs for them stays in cache


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
