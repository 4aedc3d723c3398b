"""Vision transformers: images or feature grids in, all tokens out.

A :class:`Backbone` is one of timm's vision transformers with a forward pass of its own. Parameters are timm's, under
timm's (and facebookresearch/dino's) names. :class:`Block` and :class:`Attention` take over the submodules of timm's.
"""

import difflib
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dino.errors import ConfigError
from dino.models.head import init_linear
from dino.models.inputs import input_kind
from dino.models.spec import SHAPES, BackboneSpec, Shape, resampling_matrix, shape_of

__all__ = ["Attention", "Backbone", "BackboneSpec", "Block", "Tokens", "build_backbone", "compile_blocks"]

SUPPORTED = (
    "a timm VisionTransformer or Eva (DINOv3) with pre-norm blocks, a cls token, learned or rotary positions and a "
    "final norm on its tokens"
)

COMPILE = ("auto", "true", "false")
# Graphs of one block that a run needs: student with and without the cls-only end for each size of view, and teacher.
MOST_GRAPHS = 32


class Tokens(NamedTuple):
    """Output of a backbone, after its final norm.

    A tuple, so that hooks (of FSDP2, for example) find the tensors in it.

    Attributes:
        cls: (B, D).
        registers: (B, R, D); None where the backbone has none, or with ``cls_only``.
        patches: (B, N, D), row-major; None with ``cls_only``.
    """

    cls: Tensor
    registers: Tensor | None = None
    patches: Tensor | None = None


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

    def weights(self, tokens: Tensor, first: int, rope: Tensor | None = None) -> Tensor:
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


class Backbone(nn.Module):
    """A timm vision transformer with its own forward pass.

    The differences: inputs of any fitting size with the position table resized by the spec's rule, drop-path as given
    multipliers, and optionally a last block for the cls token only.

    Args:
        spec: What to build.
        vit: The transformer, where it exists already; made from ``spec`` otherwise. Its blocks are taken over.

    Attributes:
        vit: Holds the parameters.
        checkpointing: Keep only the input of each block for the backward pass, which computes the block again (Chen et
            al. 2016, arXiv 1604.06174). The values are the same.

    Raises:
        ConfigError: The architecture is unknown or not supported.
    """

    vit: Any  # a timm model, whose optional parts type checkers cannot follow

    def __init__(self, spec: BackboneSpec, vit: nn.Module | None = None) -> None:
        super().__init__()
        self.vit = make_vit(spec) if vit is None else vit
        check_supported(self.vit, spec.arch)
        blocks = [Block(block).train(block.training) for block in self.vit.blocks]
        self.vit.blocks = nn.ModuleList(blocks)
        self.spec = spec
        self.embed_dim: int = self.vit.embed_dim
        self.depth = len(blocks)
        self.num_heads: int = blocks[0].attn.num_heads
        self.checkpointing = False
        self._matrices: dict[tuple, Tensor] = {}
        self._ropes: dict[tuple, Tensor] = {}

    def forward(self, x: Tensor, keep: Tensor | None = None, cls_only: bool = False) -> Tokens:
        """Tokens of images or grids.

        Args:
            x: (B, 3, H, W) normalised images, or (B, D_in, h, w) feature grids.
            keep: (B, depth, 2) multipliers of the residual branches, 0 or 1 / (1 - p) (stochastic depth, Huang et al.
                2016, arXiv 1603.09382); None for 1.
            cls_only: Return the cls token only, which makes the last block cheaper. Exact.

        Returns:
            The tokens.

        Raises:
            ConfigError: The input does not fit.
        """
        tokens = self.embed(x)
        keeps = _by_block(keep, tokens, self.depth)
        ropes = self._rotary(x)
        for index, block in enumerate(self.vit.blocks):
            first = 1 if cls_only and index == self.depth - 1 else None
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing inside a block is random: drop-path comes as multipliers.
                tokens = checkpoint(
                    block, tokens, keeps[index], first, ropes[index], use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, keeps[index], first, ropes[index])
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
            (B, heads, N); a row sums to 1 less the attention to cls token and registers.
        """
        tokens, ropes = self.embed(x), self._rotary(x)
        *body, last = self.vit.blocks
        for block, rope in zip(body, ropes[:-1], strict=True):
            tokens = block(tokens, rope=rope)
        weights = last.attn.weights(last.norm1(tokens), first=1, rope=ropes[-1])  # (B, heads, 1, 1 + R + N)
        return weights[:, :, 0, self.vit.num_prefix_tokens :]

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + R + N, D) that enter the first block."""
        input_kind(self.spec.level).check_input(x, self.spec)
        vit = self.vit
        patches = vit.patch_embed(x)  # (B, h, w, D)
        size = (patches.shape[1], patches.shape[2])
        patches = patches.flatten(1, 2)  # (B, N, D)
        prefix = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.pos_embed is None:
            tokens = torch.cat([*prefix, patches], dim=1)
        elif vit.no_embed_class:
            tokens = torch.cat([*prefix, patches + self.positions(size)], dim=1)
        else:
            tokens = torch.cat([*prefix, patches], dim=1) + self.positions(size)
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

    def _rotary(self, x: Tensor) -> list[Tensor | None]:
        """The rotary embedding of each block (Su et al. 2021, arXiv 2104.09864), as timm's module computes it."""
        rope = getattr(self.vit, "rope", None)
        if rope is None:
            return [None] * self.depth
        size = (x.shape[2] // self.spec.patch_size, x.shape[3] // self.spec.patch_size)
        with torch.autocast(x.device.type, enabled=False):
            if getattr(self.vit, "rope_mixed", False):  # learned frequencies, (depth, heads, N, 2 d)
                return list(rope.get_embed(shape=size).unbind(0))
            key = (size, x.device, self.vit.cls_token.dtype)
            if key not in self._ropes:
                with torch.inference_mode(False), torch.no_grad():
                    self._ropes[key] = rope.get_embed(shape=size)  # (N, 2 d)
        return [self._ropes[key]] * self.depth


def _by_block(keep: Tensor | None, tokens: Tensor, depth: int) -> list[Tensor | None]:
    """The (B, 2) multipliers of each block, from (B, depth, 2)."""
    if keep is None:
        return [None] * depth
    dtype = torch.promote_types(keep.dtype, tokens.dtype)
    return list(keep.to(device=tokens.device, dtype=dtype).unbind(1))


# ------------------------------------------------------------------------------------------------- building


def build_backbone(spec: BackboneSpec, seed: int) -> Backbone:
    """A backbone with DINO's initial weights; the same seed gives the same weights.

    Neither reads nor changes the state of torch's global generators.

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


def make_vit(spec: BackboneSpec) -> Any:
    """The timm model of ``spec``, without a classifier, for any input size that its patch size divides.

    Raises:
        ConfigError: The name is unknown, the kind of model is not supported, or a size does not fit.
    """
    kind, shape = input_kind(spec.level), shape_of(spec.arch)
    kind.check_arch(spec.arch)
    if shape is None:
        vit = make_timm(spec.arch, img_size=tuple(spec.img_size), in_chans=spec.input_dim)
        patch_size = vit.patch_embed.patch_size[0]
        if patch_size != spec.patch_size:
            raise ConfigError(
                f"model.patch_size: {spec.arch} has {patch_size}, found {spec.patch_size}: "
                f"set model.patch_size={patch_size}"
            )
        return vit
    if shape.dim % shape.heads:
        raise ConfigError(f"model.arch: heads must divide dim, found dim={shape.dim} heads={shape.heads}")
    arguments = timm_arguments(shape, spec) | {"dynamic_img_size": True, "weight_init": "skip", **kind.timm_arguments}
    return VisionTransformer(**arguments, norm_layer=partial(nn.LayerNorm, eps=1e-6))


def timm_arguments(shape: Shape, spec: BackboneSpec) -> dict[str, Any]:
    """Arguments of timm's ``VisionTransformer`` for ``shape``, as plain values."""
    return {
        "img_size": tuple(spec.img_size),
        "patch_size": spec.patch_size,
        "in_chans": spec.input_dim,
        "num_classes": 0,
        "global_pool": "token",
        "embed_dim": shape.dim,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": shape.mlp_ratio,
        "reg_tokens": shape.registers,
        "init_values": shape.layer_scale or None,
        "no_embed_class": shape.no_embed_class,
    }


def make_timm(name: str, **arguments: Any) -> Any:
    """A timm model by name, if :class:`Backbone` supports it.

    Raises:
        ConfigError: timm has no such model, or it is not a supported one.
    """
    if not timm.is_model(name.split(".", maxsplit=1)[0]):
        near = difflib.get_close_matches(name, [*SHAPES, *timm.list_models("vit*")], 1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ConfigError(f"model.arch: expected {', '.join(SHAPES)} or a timm name, found {name!r}{hint}")
    try:
        vit: Any = timm.create_model(name, num_classes=0, dynamic_img_size=True, **arguments)
    except TypeError as error:  # other families do not know dynamic_img_size
        raise ConfigError(f"model.arch: {name} is not supported; what is: {SUPPORTED}") from error
    check_supported(vit, name)
    return vit


def check_supported(vit: Any, name: str) -> None:
    """Raise ConfigError unless the forward pass of ``Backbone`` is the one that ``vit`` was made for."""
    block_types = {VisionTransformer: (TimmBlock, (TimmAttention,)), Eva: (EvaBlock, (EvaAttention, AttentionRope))}
    block_type, attention_types = block_types.get(type(vit), (None, ()))
    fits = (
        block_type is not None
        and vit.cls_token is not None
        and (vit.pos_embed is not None or getattr(vit, "rope", None) is not None)
        and not getattr(getattr(vit, "rope", None), "aug_active", False)  # random coordinates from a global generator
        and vit.attn_pool is None
        and not isinstance(vit.norm, nn.Identity)
        and all(type(block) is block_type and type(block.attn) in attention_types for block in vit.blocks)
        and all(getattr(block.attn, "gate", None) is None for block in vit.blocks)
    )
    if not fits:
        raise ConfigError(f"model.arch: {name} is not supported; what is: {SUPPORTED}")


@torch.no_grad()
def init_weights(vit: Any, generator: torch.Generator) -> None:
    """Initialize a ViT as facebookresearch/dino does; norms and LayerScale stay as they are made.

    Linear layers, cls token, registers and position table: normal, std 0.02, cut at +-2; biases 0. The patch
    convolution keeps torch's default (uniform, bound 1 / sqrt(fan_in)).
    """
    for token in (vit.pos_embed, vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02, generator=generator)
    for layer in vit.modules():
        if isinstance(layer, nn.Linear):
            init_linear(layer, generator)
        elif isinstance(layer, nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


# ------------------------------------------------------------------------------------------------- compiling


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


def compile_blocks(backbone: Backbone, warn: Callable[[str], None], backend: str = "inductor") -> None:
    """Compile the blocks of ``backbone``, in place; names of parameters and forward hooks stay as they are.

    A copy of the backbone has compiled blocks too, which share the graphs.

    Args:
        backbone: Its ``blocks[i].forward`` is replaced.
        warn: Receives a warning when the blocks cannot be compiled.
        backend: torch's compiler.
    """
    forward = CompiledForward(warn, backend)
    for block in backbone.vit.blocks:
        block.forward = MethodType(forward, block)


def should_compile(setting: str, device: torch.device) -> bool:
    """Whether ``speed.compile`` (``auto``: on a GPU; ``true`` or ``false``) compiles on ``device``.

    Raises:
        ConfigError: The setting is none of the three.
    """
    word = setting.lower()
    if word not in COMPILE:
        raise ConfigError(f"expected speed.compile auto, true or false, found '{setting}'")
    return word == "true" or (word == "auto" and device.type == "cuda")
