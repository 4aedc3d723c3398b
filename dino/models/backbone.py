"""Vision transformers: images or feature grids in, all tokens out.

A :class:`Backbone` is one of timm's vision transformers with a forward pass of its own. Parameters are timm's, under
timm's (and facebookresearch/dino's) names.
"""

import difflib
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, SwiGLUPacked
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino.errors import ConfigError
from dino.models.blocks import Block, CompiledForward
from dino.models.head import init_linear
from dino.models.inputs import input_kind
from dino.models.spec import SHAPES, BackboneSpec, Shape, resampling_matrix, shape_of

__all__ = ["Backbone", "BackboneSpec", "Block", "Tokens", "build_backbone", "compile_blocks"]

SUPPORTED = (
    "a timm VisionTransformer or Eva (DINOv3) with pre-norm blocks, a cls token, learned or rotary positions and a "
    "final norm on its tokens"
)

COMPILE = ("auto", "true", "false")


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
        self.mask_token: nn.Parameter | None
        self.register_parameter("mask_token", None)
        self._matrices: dict[tuple, Tensor] = {}
        self._ropes: dict[tuple, Tensor] = {}

    def add_mask_token(self, initial: Tensor | None = None) -> None:
        """Give it a ``mask_token``, (1, D), which starts as ``initial``, or at 0 as in DINOv2."""
        start = torch.zeros(1, self.embed_dim)
        self.mask_token = nn.Parameter(start if initial is None else start.copy_(initial))

    def forward(
        self, x: Tensor, keep: Tensor | None = None, cls_only: bool = False, mask: Tensor | None = None
    ) -> Tokens:
        """Tokens of images or grids.

        Args:
            x: (B, 3, H, W) normalised images, or (B, D_in, h, w) feature grids.
            keep: (B, depth, 2) multipliers of the residual branches, 0 or 1 / (1 - p) (stochastic depth, Huang et al.
                2016, arXiv 1603.09382); None for 1.
            cls_only: Return the cls token only, which makes the last block cheaper. Exact.
            mask: (B, N) bool, patch tokens that are replaced by the mask token; None for none.

        Returns:
            The tokens.

        Raises:
            ConfigError: The input does not fit.
        """
        tokens = self.embed(x, mask)
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

    def attention_rollout(self, x: Tensor) -> Tensor:
        """Attention of the cls token over the patch tokens through all blocks (Abnar & Zuidema 2020, arXiv 2005.00928).

        With the mean A over heads of a block's attention and the residual connection, eq. 1: the product of
        ``(A + I) / 2`` over all blocks, whose row of the cls token is returned.

        Args:
            x: As in ``forward``.

        Returns:
            (B, N) float32 or float64.
        """
        tokens, ropes = self.embed(x), self._rotary(x)
        dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        product: Tensor | None = None
        for block, rope in zip(self.vit.blocks, ropes, strict=True):
            weights = block.attn.weights(block.norm1(tokens), first=None, rope=rope)  # (B, heads, 1 + R + N, same)
            tokens = block(tokens, rope=rope)
            with torch.autocast(tokens.device.type, enabled=False):
                mixed = weights.mean(1, dtype=dtype) / 2
                mixed.diagonal(dim1=1, dim2=2).add_(0.5)
                product = mixed if product is None else mixed @ product
        assert product is not None
        return product[:, 0, self.vit.num_prefix_tokens :]

    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, 1 + R + N, D) that enter the first block; arguments as in ``forward``."""
        input_kind(self.spec.level).check_input(x, self.spec)
        vit = self.vit
        patches = vit.patch_embed(x)  # (B, h, w, D)
        size = (patches.shape[1], patches.shape[2])
        patches = patches.flatten(1, 2)  # (B, N, D)
        if mask is not None:
            assert self.mask_token is not None
            # Selecting keeps the mask token in the graph, and its gradient 0, where nothing is masked.
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
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
    if shape.swiglu:
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
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
