"""Layouts of published state dicts, converted to this package's names, which are timm's.

- timm, facebookresearch/dino, HIPT: prefixes only; HIPT's level 2 has ``phi.0`` for the embedding.
- DINOv2 (Oquab et al. 2023, arXiv 2304.07193): registers (Darcet et al. 2023, arXiv 2309.16588) have no position, but
  the cls token has one, which is added to it, as timm does; SwiGLU is ``w12`` and ``w3``; blocks may be in chunks.
- DINOv3 (Siméoni et al. 2025, arXiv 2508.10104): registers are ``storage_tokens``; the bias of keys is masked; SwiGLU
  is ``w1``, ``w2`` and ``w3``; rotary positions are computed, not learned.
- transformers' ``Dinov2Model``, ``Dinov2WithRegistersModel`` and ``DINOv3ViTModel``: other names for the same.

Conversion is by name: a tensor that no rule explains keeps its name, and then fits no backbone.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino.errors import CheckpointError

SUPPORTED = (
    "supported are timm's VisionTransformer and DINOv3, facebookresearch/dino, HIPT, Meta's DINOv2 and DINOv3, and "
    "transformers' Dinov2Model, Dinov2WithRegistersModel and DINOv3ViTModel"
)
CONTAINERS = ("state_dict", "model")
PREFIX = re.compile(r"^(module\.|backbone\.|dinov2\.|dinov2_with_registers\.|dinov3_vit\.)+")
# Heads, DINOv3's norm for the cls token of local crops in training, and projectors of distilled models.
HEADS = re.compile(r"^(\w*head\.|fc_norm\.|last_layer\.|mlp\.|local_cls_norm\.|projectors\.)")

PLAIN, DINOV2, DINOV3 = "timm", "DINOv2", "DINOv3"

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


HIPT = _rules((r"^phi\.0\.", "patch_embed.proj."))
# DINOv2 numbers the blocks of a chunk on from those of the chunk before: the second number is the index.
META = _rules((r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"), (r"^(register|storage)_tokens$", "reg_token"))
DINOV2_RULES = _rules((r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))
DINOV3_RULES = _rules(
    (r"\.ls(\d)\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
TRANSFORMERS = _rules(  # to Meta's names
    (r"^(model\.)?(encoder\.)?layer\.", "blocks."),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
)
UNGATED = _rules((r"\.mlp\.w2\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))  # transformers' DINOv3 without SwiGLU


@dataclass(frozen=True)
class Published:
    """Tensors of a backbone under this package's names, and what came with them.

    Attributes:
        tensors: By name.
        left_over: Names, as found, of what is not part of the backbone: heads, the mask token.
        mask_token: (1, D), where there is one.
        layout: ``PLAIN``, ``DINOV2`` or ``DINOV3``.
        periods: Those of DINOv3's rotary embedding, (head dim / 4,), where they are stored.
    """

    tensors: dict[str, Tensor]
    left_over: list[str]
    mask_token: Tensor | None
    layout: str
    periods: Tensor | None


def backbone_tensors(content: Mapping[str, Any], which: str, source: str) -> Published:
    """Tensors of the backbone in a checkpoint, under this package's names.

    Args:
        content: The checkpoint.
        which: ``teacher`` or ``student``, where it contains both.
        source: Name of the checkpoint in errors.

    Raises:
        CheckpointError: It contains no tensors, lacks ``which``, has two tensors of one name, or values that no
            backbone of this package can represent.
    """
    tensors: dict[str, Tensor] = {}
    left_over: list[str] = []
    for found, tensor in _state_dict(content, which, source).items():
        if not isinstance(tensor, Tensor):
            continue
        name = PREFIX.sub("", found.replace("_orig_mod.", ""))
        if HEADS.match(name):
            left_over.append(found)
        elif name in tensors:
            raise CheckpointError(f"{source}: two tensors are both called {name} (one of them as {found})")
        else:
            tensors[name] = tensor
            left_over += [found] if name.endswith("mask_token") else []
    if not tensors:
        raise CheckpointError(f"{source}: expected the tensors of a vision transformer, found none")
    periods = tensors.pop("rope_embed.periods", None)
    tensors, layout = _converted(tensors, source, DINOV3 if periods is not None else None)
    mask_token = tensors.pop("mask_token", None)
    if mask_token is not None:
        mask_token = mask_token.reshape(1, -1)
    return Published(tensors, left_over, mask_token, layout, periods)


def _state_dict(content: Mapping[str, Any], which: str, source: str) -> Mapping[str, Any]:
    if isinstance(content.get(which), Mapping):
        return content[which]
    if isinstance(content.get("teacher"), Mapping) or isinstance(content.get("student"), Mapping):
        raise CheckpointError(f"{source}: expected a {which!r} in it, found {sorted(map(str, content))}")
    for name in CONTAINERS:
        if isinstance(content.get(name), Mapping):
            return content[name]
    return content


def _converted(tensors: dict[str, Tensor], source: str, layout: str | None) -> tuple[dict[str, Tensor], str]:
    """Tensors under this package's names, and their layout, told by them unless it is known."""
    tensors = _renamed(tensors, HIPT, source)
    if any(name.startswith("embeddings.") for name in tensors):
        tensors = _joined(_renamed(tensors, TRANSFORMERS, source), source)
        if "pos_embed" not in tensors and not any(".mlp.w1." in name for name in tensors):
            tensors = _renamed(tensors, UNGATED, source)
    has_registers = "register_tokens" in tensors
    layout = layout or _layout(tensors)
    tensors = _renamed(tensors, META, source)
    if layout == DINOV3:
        return _renamed(_without_key_bias(tensors, source), DINOV3_RULES, source), layout
    if layout == DINOV2:
        tensors = _renamed(tensors, DINOV2_RULES, source)
    if has_registers and {"cls_token", "pos_embed"} <= tensors.keys():
        table = tensors["pos_embed"]
        tensors |= {"cls_token": tensors["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}
    return tensors, layout


def _layout(tensors: Mapping[str, Tensor]) -> str:
    def any_is(test: Callable[[str], bool]) -> bool:
        return any(test(name) for name in tensors)

    if any_is(lambda name: name == "storage_tokens" or name.endswith(".bias_mask")):
        return DINOV3
    if "pos_embed" in tensors:
        marks = ("register_tokens", "mask_token", "blocks.0.mlp.w12.weight", "blocks.0.0.norm1.weight")
        return DINOV2 if any_is(marks.__contains__) else PLAIN
    # transformers' DINOv3; timm's has gamma_1 and q_bias already.
    return DINOV3 if any_is(lambda name: name.endswith(".ls1.gamma")) else PLAIN


def _renamed(tensors: Mapping[str, Tensor], rules: Rules, source: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for found, tensor in tensors.items():
        name = found
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise CheckpointError(f"{source}: two tensors are both called {name} (one of them as {found})")
        renamed[name] = tensor
    return renamed


def _joined(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Queries, keys and values of each block as one ``qkv``; a missing bias is 0."""
    joined = dict(tensors)
    for name in [name for name in tensors if name.endswith(".attn.query.weight")]:
        block = name.removesuffix("query.weight")
        for kind in ("weight", "bias"):
            parts = [joined.pop(f"{block}{part}.{kind}", None) for part in ("query", "key", "value")]
            known = [part for part in parts if part is not None]
            if not known:
                continue
            if kind == "weight" and len(known) < 3:
                raise CheckpointError(f"{source}: expected {block}query, key and value, found {len(known)} of them")
            filled = [torch.zeros_like(known[0]) if part is None else part for part in parts]
            joined[f"{block}qkv.{kind}"] = torch.cat(filled)
    return joined


def _without_key_bias(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """DINOv3's ``qkv.bias``, times its mask, as the ``q_bias`` and ``v_bias`` of timm; that of keys must be 0."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".bias_mask"):
            continue
        if not name.endswith("qkv.bias"):
            split[name] = tensor
            continue
        mask = tensors.get(f"{name}_mask")
        masked = tensor if mask is None else torch.where(mask.isnan(), torch.nan, tensor * mask)
        query, key, value = masked.chunk(3)
        if not bool((key == 0).all()):
            raise CheckpointError(f"{source}: expected a DINOv3 model without a bias for keys, found one in {name}")
        split |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    return split
