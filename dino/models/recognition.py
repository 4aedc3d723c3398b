"""Which backbone a state dict belongs to, told by the names and shapes of its tensors."""

import math
from collections.abc import Mapping

import timm
import torch
from torch import Tensor

from dino.errors import CheckpointError
from dino.models.backbone import BackboneSpec, make_timm
from dino.models.inputs import INPUTS, TILE_SIZE_PX, input_kind
from dino.models.layouts import DINOV3, PLAIN, SUPPORTED, Published
from dino.models.spec import Shape, arch_of, shape_of

# timm's names of the published models contain these words; the widths tell which of them to compare.
FAMILIES = ("dinov2", "dinov3")
WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant", 4096: "7b"}

IN_A_RUN = "(with model.init it is model.init_arch=...)"


def infer_spec(
    published: Published, arch: str | None, source: str, pos_resample: str, img_size: int = TILE_SIZE_PX
) -> BackboneSpec:
    """Infer from tensors which backbone they belong to.

    Args:
        published: The tensors.
        arch: Architecture given by the user; needed where the tensors do not determine heads or table.
        source: Name of the checkpoint in errors.
        pos_resample: Rule that resizes a position table of timm's layout; that of registers and of the DINO models
            is known (:func:`position_rule`).
        img_size: Image size in px of a model without a position table.

    Raises:
        CheckpointError: A needed tensor is missing, the family is not supported, or the tensors do not determine heads
            or table.
    """
    tensors = published.tensors
    arch = arch or published_name(published)
    plain = arch is None or shape_of(arch) is not None
    needed = ["cls_token", "patch_embed.proj.weight"] + ["pos_embed", "blocks.0.mlp.fc1.weight"] * plain
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise CheckpointError(_unsupported(published, missing, source))
    embed = tensors["patch_embed.proj.weight"]  # (D, C, p, p), or (D, D_in) for grids
    level = input_of(embed)
    patch_size = input_kind(level).patch_size(embed)
    rule = position_rule(published, pos_resample)
    if "pos_embed" not in tensors:
        size = max(patch_size, img_size - img_size % patch_size)
        return BackboneSpec(str(arch), level, embed.shape[1], (size, size), patch_size, rule)
    side, no_embed_class = _table_side(tensors, source)
    known = shape_of(arch) if arch else None
    if arch is None:
        arch = arch_of(_shape(tensors, level, no_embed_class, source), level)
    elif known is not None and known.no_embed_class != no_embed_class:
        rows = tensors["pos_embed"].shape[1]
        raise CheckpointError(f"{source}: a position table of {rows} rows does not fit arch={arch}")
    size = side * patch_size
    return BackboneSpec(arch, level, embed.shape[1], (size, size), patch_size, rule)


def position_rule(published: Published, default: str) -> str:
    """The rule (``pos_resample``) with which the authors of a model resize its position table.

    DINOv2's code resizes the tables of models with registers with antialias and to the size itself (``timm``), that of
    models without as DINO does (``dino``), where timm resizes both as the former.

    Args:
        published: The model.
        default: The rule of models of timm's layout without registers.
    """
    if "reg_token" in published.tensors:
        return "timm"
    return default if published.layout == PLAIN else "dino"


def published_name(published: Published) -> str | None:
    """Timm's name of a DINOv2 or DINOv3 model whose tensors have exactly these names and shapes; None for any other."""
    tensors = published.tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    width = WIDTHS.get(shapes["cls_token"][-1]) if "cls_token" in shapes else None
    scaled = "blocks.0.ls1.gamma" in shapes or "blocks.0.gamma_1" in shapes
    if width is None or not scaled:
        return None
    for name in timm.list_models([f"vit_{width}_*{family}*" for family in FAMILIES]):
        with torch.device("meta"):
            other = {key: tensor.shape for key, tensor in make_timm(name).state_dict().items()}
        if other.keys() == shapes.keys() and all(other[key] == shapes[key] for key in shapes if key != "pos_embed"):
            return name
    return None


def _unsupported(published: Published, missing: list[str], source: str) -> str:
    tensors = published.tensors
    if published.layout == DINOV3:
        dim = tensors["cls_token"].shape[-1] if "cls_token" in tensors else "unknown"
        depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)
        names = ", ".join(timm.list_models("vit_*dinov3*"))
        return (
            f"{source}: a DINOv3 model of dim {dim} and {depth} blocks fits none of timm's: expected the tensors of "
            f"{names}"
        )
    shown = ", ".join(sorted(tensors)[:4])
    return (
        f"{source}: not a supported ViT: {', '.join(missing)} missing, found {shown}, ...; {SUPPORTED}; a timm model "
        f"without a position table or with a gated MLP may need its name, as arch=NAME {IN_A_RUN}"
    )


def input_of(weight: Tensor) -> str:
    """The level whose embedding layer has a weight of this shape."""
    return next((name for name, kind in INPUTS.items() if kind.matches(weight)), next(iter(INPUTS)))


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
    heads = input_kind(level).num_heads(dim)
    if heads is None:
        example = f"arch=vit:dim={dim},depth={depth},heads=..."
        raise CheckpointError(
            f"{source}: dim {dim} does not determine its number of heads: give it, as {example} {IN_A_RUN}"
        )
    return Shape(
        dim,
        depth,
        heads,
        registers=_registers(tensors),
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in tensors else 0.0,
        no_embed_class=no_embed_class,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        swiglu=2 * tensors["blocks.0.mlp.fc2.weight"].shape[1] == tensors["blocks.0.mlp.fc1.weight"].shape[0],
    )
