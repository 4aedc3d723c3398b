"""Checkpoints of others: what their tensors are called here, and which backbone they belong to.

Known layouts: facebookresearch/dino (``student`` and ``teacher`` with ``module.`` and ``backbone.`` before the names,
or a bare state dict), HIPT's two levels (the second with ``phi.0`` for the embedding), torch.compile's ``_orig_mod.``,
and timm.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dino.errors import CheckpointError
from dino.models.spec import BackboneSpec, Shape, arch_of, shape_of

HEAD_DIM = 64
REGION_HEADS = 6
CONTAINERS = ("state_dict", "model")
PREFIX = re.compile(r"^(module\.|backbone\.)+")
HEADS = re.compile(r"^(head|fc_norm|last_layer|mlp|projection_head)\.")
RENAMED = {"phi.0.weight": "patch_embed.proj.weight", "phi.0.bias": "patch_embed.proj.bias"}


def backbone_tensors(content: Mapping[str, Any], which: str, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the backbone in a checkpoint, under this package's names.

    Args:
        content: The checkpoint.
        which: ``teacher`` or ``student``, where it holds both.
        source: What to call it in an error.

    Returns:
        The tensors by name, and the names (as found) of those left over: heads.

    Raises:
        CheckpointError: It holds no tensors, lacks ``which``, or has two tensors of one name.
    """
    content = _state_dict(content, which, source)
    kept: dict[str, Tensor] = {}
    left_over: list[str] = []
    for found, tensor in content.items():
        if not isinstance(tensor, Tensor):
            continue
        name = PREFIX.sub("", found.replace("_orig_mod.", ""))
        if HEADS.match(name):
            left_over.append(found)
            continue
        name = RENAMED.get(name, name)
        if name in kept:
            raise CheckpointError(f"{source}: two tensors are both called {name} (one of them as {found})")
        kept[name] = tensor
    if not kept:
        raise CheckpointError(f"{source}: expected the tensors of a vision transformer, found none")
    return kept, left_over


def _state_dict(content: Mapping[str, Any], which: str, source: str) -> Mapping[str, Any]:
    if isinstance(content.get(which), Mapping):
        return content[which]
    if isinstance(content.get("teacher"), Mapping) or isinstance(content.get("student"), Mapping):
        raise CheckpointError(f"{source}: expected a {which!r} in it, found {sorted(map(str, content))}")
    for name in CONTAINERS:
        if isinstance(content.get(name), Mapping):
            return content[name]
    return content


def infer_spec(tensors: Mapping[str, Tensor], arch: str | None, source: str, pos_resample: str) -> BackboneSpec:
    """Read off the tensors which backbone they belong to.

    Args:
        tensors: By this package's names.
        arch: Architecture given by the user; needed where heads or table cannot be told from the tensors.
        source: What to call the checkpoint in an error.
        pos_resample: Rule that resizes its position table.

    Raises:
        CheckpointError: A tensor that tells is missing, or heads or table cannot be told.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        shown = ", ".join(sorted(tensors)[:4])
        raise CheckpointError(f"{source}: not a supported ViT: {', '.join(missing)} missing, found {shown}, ...")
    embed = tensors["patch_embed.proj.weight"]  # (D, C, p, p), or (D, D_in) for grids
    level = "patch" if embed.ndim == 4 else "region"
    patch_size = embed.shape[-1] if level == "patch" else 1
    side, no_embed_class = _table_side(tensors, source)
    known = shape_of(arch) if arch else None
    if arch is None:
        arch = arch_of(_shape(tensors, level, no_embed_class, source), level)
    elif known is not None and known.no_embed_class != no_embed_class:
        rows = tensors["pos_embed"].shape[1]
        raise CheckpointError(f"{source}: a position table of {rows} rows does not fit arch={arch}")
    size = side * patch_size
    return BackboneSpec(arch, level, embed.shape[1], (size, size), patch_size, pos_resample)


def _table_side(tensors: Mapping[str, Tensor], source: str) -> tuple[int, bool]:
    """Tokens along a side of the (square) position table, and whether it has rows for patches only."""
    rows = tensors["pos_embed"].shape[1]
    prefix = 1 + _registers(tensors)
    sides = [(math.isqrt(max(rows - skip, 0)), skip, skip == 0) for skip in (prefix, 0)]
    fitting = [(side, bare) for side, skip, bare in sides if side and side * side + skip == rows]
    if len(fitting) != 1:
        raise CheckpointError(f"{source}: a position table of {rows} rows is not that of one square grid of tokens")
    return fitting[0]


def _registers(tensors: Mapping[str, Tensor]) -> int:
    return tensors["reg_token"].shape[1] if "reg_token" in tensors else 0


def _shape(tensors: Mapping[str, Tensor], level: str, no_embed_class: bool, source: str) -> Shape:
    dim = tensors["cls_token"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    heads, rest = (REGION_HEADS, dim % REGION_HEADS) if level == "region" else divmod(dim, HEAD_DIM)
    if rest:
        example = f"arch=vit:dim={dim},depth={depth},heads=..."
        raise CheckpointError(f"{source}: its number of heads cannot be told from dim {dim}: give it, as {example}")
    return Shape(
        dim,
        depth,
        heads,
        registers=_registers(tensors),
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in tensors else 0.0,
        no_embed_class=no_embed_class,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
    )
