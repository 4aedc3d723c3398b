"""One transformer block, run over timm's parameters: drop-path masks from outside, and only the tokens asked for."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def run_block(block: Any, tokens: Tensor, keep: Tensor | None = None, first: int | None = None) -> Tensor:
    """Output of a pre-norm block (Dosovitskiy et al. 2020, arXiv 2010.11929, eq. 2 and 3).

    Args:
        block: timm ``Block``.
        tokens: (B, N, D).
        keep: (B, 2) multipliers of the attention and the MLP branch, 0 or 1 / (1 - p); None for 1.
        first: Compute the output of this many leading tokens alone; None for all. Exact: only keys and values need
            the others.

    Returns:
        (B, first or N, D).
    """
    out = tokens[:, :first]
    out = out + _kept(block.ls1(_attend(block.attn, block.norm1(tokens), first)), keep, 0)
    return out + _kept(block.ls2(block.mlp(block.norm2(out))), keep, 1)


def attention_weights(attn: Any, tokens: Tensor, first: int) -> Tensor:
    """Softmax weights (B, heads, first, N) of the leading tokens over all; ``tokens`` are normed (B, N, D)."""
    query, key, _ = _project(attn, tokens, first)
    return (query * attn.scale @ key.transpose(-2, -1)).softmax(dim=-1)


def _kept(branch: Tensor, keep: Tensor | None, which: int) -> Tensor:
    return branch if keep is None else branch * keep[:, which, None, None]


def _project(attn: Any, tokens: Tensor, first: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, heads, first or N, d), keys and values (B, heads, N, d)."""
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if first is None:
        parts = F.linear(tokens, weight, bias).chunk(3, dim=-1)
    else:
        split = weight.shape[0] // 3
        rest = None if bias is None else bias[split:]
        head = None if bias is None else bias[:split]
        query = F.linear(tokens[:, :first], weight[:split], head)
        parts = (query, *F.linear(tokens, weight[split:], rest).chunk(2, dim=-1))
    query, key, value = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
    return attn.q_norm(query), attn.k_norm(key), value


def mix(query: Tensor, key: Tensor, value: Tensor, scale: float, fused: bool) -> Tensor:
    """Softmax attention (B, heads, M, d), by torch's fused kernel or written out; the two agree to rounding."""
    if fused:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    scores = query * scale @ key.transpose(-2, -1)  # (B, heads, M, N)
    # Autocast would make weights in fp32 only to round them for the next product. The kernel itself sums in fp32.
    with torch.autocast(query.device.type, enabled=False):
        weights = scores.softmax(dim=-1)
    return weights @ value.to(weights.dtype)


def _attend(attn: Any, tokens: Tensor, first: int | None) -> Tensor:
    query, key, value = _project(attn, tokens, first)
    # Under bf16 autocast, the default precision, the fused kernel is slower on a CPU (see docs/performance.md).
    mixed = mix(query, key, value, attn.scale, fused=tokens.device.type != "cpu")
    mixed = mixed.transpose(1, 2).flatten(2)  # (B, M, D)
    norm = getattr(attn, "norm", None)
    return attn.proj(mixed if norm is None else norm(mixed))


def as_keep(keep: Tensor | None, tokens: Tensor, depth: int) -> list[Tensor | None]:
    """The (B, 2) multipliers of each block, from (B, depth, 2)."""
    if keep is None:
        return [None] * depth
    dtype = torch.promote_types(keep.dtype, tokens.dtype)
    return list(keep.to(device=tokens.device, dtype=dtype).unbind(1))
