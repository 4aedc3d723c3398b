"""Transformer blocks with the parameters of timm's: drop-path as given multipliers, output for leading tokens only.

:class:`Block` and :class:`Attention` take over the submodules of timm's, so that names in state dicts stay.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

# Graphs of one block that a run needs: student with and without the cls-only end for each size of view, and teacher.
MOST_GRAPHS = 32


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762) with the parameters of one of timm's.

    Args:
        source: timm's ``Attention``, ``EvaAttention`` or ``AttentionRope``; its submodules are taken over.
    """

    k_bias: Tensor | None  # zeros: Eva has no bias for keys

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.qkv: Any = source.qkv  # None where the three projections are separate
        self.q_proj: Any = getattr(source, "q_proj", None)
        self.k_proj: Any = getattr(source, "k_proj", None)
        self.v_proj: Any = getattr(source, "v_proj", None)
        self.q_bias: Any = getattr(source, "q_bias", None)
        self.v_bias: Any = getattr(source, "v_bias", None)
        self.register_buffer("k_bias", getattr(source, "k_bias", None), persistent=False)
        self.q_norm: nn.Module = source.q_norm
        self.k_norm: nn.Module = source.k_norm
        self.norm: nn.Module = getattr(source, "norm", nn.Identity())
        self.proj: nn.Module = source.proj
        self.num_heads: int = source.num_heads
        self.head_dim: int = source.head_dim
        self.scale: float = source.scale
        self.kv_groups: int = getattr(source, "num_kv_groups", 1)
        self.rotate_half: bool = getattr(source, "rotate_half", False)
        self.prefix: int = getattr(source, "num_prefix_tokens", 0)

    def forward(self, tokens: Tensor, first: int | None = None, rope: Tensor | None = None) -> Tensor:
        """Output for the leading tokens.

        Args:
            tokens: (B, N, D), normed.
            first: How many tokens to compute the output for; None for all.
            rope: Sine and cosine of the rotary embedding, ([heads,] patches, 2 d); None for none.

        Returns:
            (B, first or N, D).
        """
        query, key, value = self.project(tokens, first, rope)
        # Under bf16 autocast, the default precision, the fused kernel is slower on a CPU (see docs/performance.md).
        mixed = attend(query, key, value, self.scale, fused=tokens.device.type != "cpu")
        return self.proj(self.norm(mixed.transpose(1, 2).flatten(2)))  # (B, M, D)

    def weights(self, tokens: Tensor, first: int | None, rope: Tensor | None = None) -> Tensor:
        """Softmax weights (B, heads, first, N) of the leading tokens over all; arguments as in ``forward``."""
        query, key, _ = self.project(tokens, first, rope)
        return (query * self.scale @ key.transpose(-2, -1)).softmax(dim=-1)

    def project(self, tokens: Tensor, first: int | None, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, first or N, d), keys and values (B, heads, N, d); arguments as in ``forward``."""
        if self.qkv is None:
            parts = (self.q_proj(tokens[:, :first]), self.k_proj(tokens), self.v_proj(tokens))
        else:
            parts = self._project_fused(tokens, first)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = self._rotate(query, rope).type_as(value), self._rotate(key, rope).type_as(value)
        if self.kv_groups > 1:  # grouped queries: several heads share keys and values
            key, value = (part.repeat_interleave(self.kv_groups, dim=1) for part in (key, value))
        return query, key, value

    def _project_fused(self, tokens: Tensor, first: int | None) -> tuple[Tensor, ...]:
        weight, bias = self.qkv.weight, self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])  # type: ignore[list-item]
        if first is None:
            return F.linear(tokens, weight, bias).chunk(3, dim=-1)
        split = weight.shape[0] // 3
        q_bias, kv_bias = (None, None) if bias is None else (bias[:split], bias[split:])
        query = F.linear(tokens[:, :first], weight[:split], q_bias)
        return (query, *F.linear(tokens, weight[split:], kv_bias).chunk(2, dim=-1))

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotate the patch tokens of (B, heads, M, d) by their positions; cls token and registers have none."""
        patches = x.shape[2] - self.prefix
        if patches <= 0:
            return x
        rotated = apply_rot_embed_cat(x[:, :, self.prefix :], rope[..., :patches, :], half=self.rotate_half)
        return torch.cat([x[:, :, : self.prefix], rotated], dim=2)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, fused: bool) -> Tensor:
    """Softmax attention (B, heads, M, d), by torch's fused kernel or written out; the two agree to rounding."""
    if fused:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    scores = query * scale @ key.transpose(-2, -1)  # (B, heads, M, N)
    # Autocast would make weights in fp32 only to round them for the next product. The kernel itself sums in fp32.
    with torch.autocast(query.device.type, enabled=False):
        weights = scores.softmax(dim=-1)
    return weights @ value.to(weights.dtype)


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2020, arXiv 2010.11929, eq. 2 and 3).

    Args:
        source: timm's ``Block`` or ``EvaBlock``; its submodules are taken over.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm1: nn.Module = source.norm1
        self.attn = Attention(source.attn)
        self.ls1: nn.Module = getattr(source, "ls1", nn.Identity())
        self.norm2: nn.Module = source.norm2
        self.mlp: nn.Module = source.mlp
        self.ls2: nn.Module = getattr(source, "ls2", nn.Identity())
        self.gamma_1: Any = getattr(source, "gamma_1", None)  # LayerScale of EvaBlock
        self.gamma_2: Any = getattr(source, "gamma_2", None)

    def forward(
        self, tokens: Tensor, keep: Tensor | None = None, first: int | None = None, rope: Tensor | None = None
    ) -> Tensor:
        """Output of the block.

        Args:
            tokens: (B, N, D).
            keep: (B, 2) multipliers of the attention and the MLP branch, 0 or 1 / (1 - p); None for 1.
            first: Compute the output of this many leading tokens only; None for all. Exact: the others are needed
                for keys and values only.
            rope: As in :class:`Attention`.

        Returns:
            (B, first or N, D).
        """
        attention = self.ls1(self.attn(self.norm1(tokens), first, rope))
        if self.gamma_1 is not None:
            attention = self.gamma_1 * attention
        out = tokens[:, :first] + (attention if keep is None else attention * keep[:, 0, None, None])
        mlp = self.ls2(self.mlp(self.norm2(out)))
        if self.gamma_2 is not None:
            mlp = self.gamma_2 * mlp
        return out + (mlp if keep is None else mlp * keep[:, 1, None, None])


class CompiledForward:
    """:meth:`Block.forward`, compiled by torch: one graph for all blocks, one for each size of input.

    Blocks are compiled rather than whole networks because that takes a fraction of the time. The parameters of a block
    and its drop-path multipliers are inputs of the graph. torch caches what it compiled (``TORCHINDUCTOR_CACHE_DIR``)
    for the next start. Where compiling fails the blocks run uncompiled, with one warning. In inference mode
    (evaluation, extraction) they always do: those batches come in many sizes, and each would be compiled anew.

    Args:
        warn: Receives the warning.
        backend: torch's compiler; tests use one that needs no C++.
    """

    def __init__(self, warn: Callable[[str], None], backend: str = "inductor") -> None:
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        self.warn, self.failed, self._failures = warn, False, TorchDynamoException
        # DDP averages gradients in buckets; splitting graphs at their borders is for whole networks.
        config.optimize_ddp = False
        config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
        self._compiled = torch.compile(Block.forward, dynamic=False, backend=backend)

    def __call__(self, block: Block, *args: Any, **kwargs: Any) -> Tensor:
        """As :meth:`Block.forward`."""
        if self.failed or torch.is_inference_mode_enabled():
            return Block.forward(block, *args, **kwargs)
        try:
            return self._compiled(block, *args, **kwargs)
        except self._failures as error:
            self.failed = True
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            self.warn(
                f"the blocks cannot be compiled here ({reason}); training continues uncompiled. Compiling needs triton "
                "and compute capability 7.0 on a GPU, a C++ compiler on a CPU; speed.compile=false does not try"
            )
            return Block.forward(block, *args, **kwargs)
