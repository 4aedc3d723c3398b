"""Makes timm vision transformers, and starts their weights as DINO does."""

import difflib
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from dino.errors import ConfigError
from dino.models.init import init_linear
from dino.models.region_vit import GridEmbed
from dino.models.spec import SHAPES, BackboneSpec, Shape, shape_of

SUPPORTED = "a timm VisionTransformer with a cls token, a learned position table and a final norm on its tokens"


def make_vit(spec: BackboneSpec) -> VisionTransformer:
    """The timm model of ``spec``, without a classifier, taking any input size its patch size divides.

    Raises:
        ConfigError: The name is unknown, the kind of model is not supported, or a size does not fit.
    """
    shape = shape_of(spec.arch)
    if shape is None:
        return _named(spec)
    if spec.arch.startswith("hvit") and spec.level != "region":
        raise ConfigError(f"model.arch: {spec.arch} reads feature grids; for images use e.g. vit_small")
    if shape.dim % shape.heads:
        raise ConfigError(f"model.arch: heads must divide dim, found dim={shape.dim} heads={shape.heads}")
    arguments = timm_arguments(shape, spec) | {"dynamic_img_size": True, "weight_init": "skip"}
    if spec.level == "region":
        arguments["embed_layer"] = GridEmbed
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
    """A timm model by name, refused unless this package can run it.

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


def _named(spec: BackboneSpec) -> Any:
    if spec.level == "region":
        expected = "hvit_xs, vit_tiny, vit_small, vit_base, vit_large or vit:dim=...,depth=...,heads=..."
        raise ConfigError(f"model.arch: level 2 takes {expected}, found {spec.arch!r}")
    vit = make_timm(spec.arch, img_size=tuple(spec.img_size), in_chans=spec.input_dim)
    patch_size = vit.patch_embed.patch_size[0]
    if patch_size != spec.patch_size:
        raise ConfigError(
            f"model.patch_size: {spec.arch} has {patch_size}, found {spec.patch_size}: "
            f"set model.patch_size={patch_size}"
        )
    return vit


def check_supported(vit: Any, name: str) -> None:
    """Raise ConfigError unless the forward pass of ``Backbone`` is the one that ``vit`` was made for."""
    fits = (
        type(vit) is VisionTransformer
        and vit.has_class_token
        and vit.pos_embed is not None
        and vit.attn_pool is None
        and not isinstance(vit.norm, nn.Identity)
        and all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks)
        and all(getattr(block.attn, "gate", None) is None for block in vit.blocks)
    )
    if not fits:
        raise ConfigError(f"model.arch: {name} is not supported; what is: {SUPPORTED}")


@torch.no_grad()
def init_weights(vit: Any, generator: torch.Generator) -> None:
    """Start a ViT as facebookresearch/dino does; norms and LayerScale stay as they are made.

    Linear layers, cls token, registers and position table: normal, std 0.02, cut at +-2; biases 0. The patch
    convolution keeps torch's uniform start (bound 1 / sqrt(fan_in)).
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
