"""A backbone as a folder that timm loads: ``timm.create_model("local-dir:DIR", pretrained=True, num_classes=0)``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dino.files import atomic_path, write_json
from dino.models.backbone import timm_arguments
from dino.models.checkpoint import PACKAGE, Description
from dino.models.inputs import input_kind
from dino.models.sharing import base_name, shareable
from dino.models.spec import BackboneSpec, shape_of
from dino.models.transforms import TRANSFORMS
from dino.models.weights import LoadedBackbone

SWIGLU = "vit_giant_patch14_dinov2"


def export_backbone(
    loaded: LoadedBackbone, directory: Path, tile_size_px: int | None = None, *, ids: bool = False
) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    timm resizes position tables by a rule of its own. So the table is written as this package's rule resizes it for
    ``tile_size_px`` (level 2: for the grid of a region), and timm then gives this package's features at that size.
    Level-2 exports name the architecture ``hvit_xs``, which is registered with timm by ``import dino``.

    Args:
        loaded: What to export.
        directory: Where; created when absent, files in it replaced.
        tile_size_px: Size of the tiles that a level-1 export is for; None for 256, or the largest multiple of the patch
            size below.
        ids: Write the ids of the slides and patients of the pretraining, not salted hashes of them.

    Raises:
        ConfigError: The patch size does not divide ``tile_size_px``, or the source has no ids to write.
    """
    spec = loaded.backbone.spec
    spec = replace(spec, img_size=input_kind(spec.level).export_size(spec, tile_size_px, loaded.region_cells))
    architecture, arguments = _timm_entry(spec)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": loaded.backbone.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": _pretrained_config(loaded, spec),
        PACKAGE: _section(loaded, spec, ids),
    }
    weights, about = directory / "model.safetensors", directory / "config.json"

    def begin(_: Path) -> None:
        about.unlink(missing_ok=True)  # of an earlier export: the folder is none until the new one is complete

    with atomic_path(weights, check=begin) as temporary, temporary.open("wb") as file:
        file.write(save(_resized(loaded, spec), metadata={"format": "pt"}))
    write_json(about, json.loads(json.dumps(config, default=str)))


@torch.no_grad()
def _resized(loaded: LoadedBackbone, spec: BackboneSpec) -> dict[str, Tensor]:
    """The weights, with a position table for ``spec.img_size``."""
    tensors = {name: tensor.contiguous() for name, tensor in loaded.backbone.vit.state_dict().items()}
    if "pos_embed" in tensors:
        size = (spec.img_size[0] // spec.patch_size, spec.img_size[1] // spec.patch_size)
        tensors["pos_embed"] = loaded.backbone.positions(size).contiguous()
    return tensors


def _timm_entry(spec: BackboneSpec) -> tuple[str, dict[str, Any]]:
    """The name that timm knows, and the arguments to give with it."""
    shape = shape_of(spec.arch)
    if shape is None:
        return spec.arch, {"img_size": list(spec.img_size), "num_classes": 0, "global_pool": "token"}
    arguments = timm_arguments(shape, spec) | {"img_size": list(spec.img_size)}
    if shape.swiglu:  # a config has no place for layers: the model with these layers, of another size
        return SWIGLU, arguments
    return input_kind(spec.level).export_entry(spec.arch), arguments


def _pretrained_config(loaded: LoadedBackbone, spec: BackboneSpec) -> dict[str, Any]:
    kind = input_kind(spec.level)
    config: dict[str, Any] = {
        "input_size": [spec.input_dim, *spec.img_size],
        "fixed_input_size": True,
        "num_classes": 0,
        "classifier": "head",
        "first_conv": kind.first_conv,
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bicubic",
    }
    if kind.normalized:
        transform = loaded.transform or TRANSFORMS["imagenet"]
        config |= {"mean": list(transform.mean), "std": list(transform.std)}
    return config


def _section(loaded: LoadedBackbone, spec: BackboneSpec, ids: bool) -> dict[str, Any]:
    """The description of a checkpoint as it is given to others, and where the weights come from."""
    geometry = {
        "spacing_um": loaded.spacing_um,
        "spacings_um": list(loaded.spacings_um),
        "tile_size_px": loaded.tile_size_px,
        "region_cells": loaded.region_cells,
    }
    description = Description(spec, loaded.transform, loaded.step, geometry, loaded.config, loaded.details)
    return {
        **shareable(description, loaded.fingerprint, ids=ids, source=loaded.source).to_dict(),
        "own": loaded.own,
        "source": base_name(loaded.source),
        "source_fingerprint": loaded.fingerprint,
    }
