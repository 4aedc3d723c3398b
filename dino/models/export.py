"""A backbone as a folder that timm loads: ``timm.create_model("local-dir:DIR", pretrained=True, num_classes=0)``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dino.errors import ConfigError
from dino.files import atomic_path, write_json
from dino.models.backbone import timm_arguments
from dino.models.spec import BackboneSpec, shape_of
from dino.models.transforms import TRANSFORMS
from dino.models.weights import FORMAT, SECTION, LoadedBackbone

REGION_CELLS = (16, 16)  # of 256 px in a region of 4096 px, where the checkpoint does not say

# Which timm entry makes which of this package's architectures; its arguments are all given, so that any would do.
ENTRIES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
}


def export_backbone(loaded: LoadedBackbone, directory: Path, tile_size_px: int = 256) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    timm resizes positions by a rule of its own; so the table is written as this package's rule makes it for
    ``tile_size_px`` (level 2: for the grid of a region), and timm then gives this package's features at that size.
    Level-2 exports name the architecture ``hvit_xs``, which timm knows after ``import dino``.

    Args:
        loaded: What to export.
        directory: Where; created when absent, files in it replaced.
        tile_size_px: Side of the tiles that a level-1 export is for.

    Raises:
        ConfigError: The patch size does not divide ``tile_size_px``.
    """
    spec = replace(loaded.backbone.spec, img_size=_input_size(loaded, tile_size_px))
    architecture, arguments = _entry(spec)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": loaded.backbone.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": _pretrained_config(loaded, spec),
        SECTION: _history(loaded, spec),
    }
    weights, about = directory / "model.safetensors", directory / "config.json"

    def begin(_: Path) -> None:
        about.unlink(missing_ok=True)  # of an earlier export: until the new one stands, the folder is none

    with atomic_path(weights, check=begin) as temporary, temporary.open("wb") as file:
        file.write(save(_baked(loaded, spec), metadata={"format": "pt"}))
    write_json(about, json.loads(json.dumps(config, default=str)))


def _input_size(loaded: LoadedBackbone, tile_size_px: int) -> tuple[int, int]:
    if loaded.level == "region":
        cells = loaded.region_cells or REGION_CELLS
        return (cells[0], cells[1])
    patch_size = loaded.backbone.spec.patch_size
    if tile_size_px < patch_size or tile_size_px % patch_size:
        near = max(1, round(tile_size_px / patch_size)) * patch_size
        raise ConfigError(
            f"tile_size_px: expected a multiple of the patch size {patch_size}, found {tile_size_px}: e.g. {near}"
        )
    return (tile_size_px, tile_size_px)


@torch.no_grad()
def _baked(loaded: LoadedBackbone, spec: BackboneSpec) -> dict[str, Tensor]:
    tensors = {name: tensor.contiguous() for name, tensor in loaded.backbone.vit.state_dict().items()}
    size = (spec.img_size[0] // spec.patch_size, spec.img_size[1] // spec.patch_size)
    return {**tensors, "pos_embed": loaded.backbone.positions(size).contiguous()}


def _entry(spec: BackboneSpec) -> tuple[str, dict[str, Any]]:
    """The name that timm knows, and the arguments to give with it."""
    shape = shape_of(spec.arch)
    if shape is None:
        return spec.arch, {"img_size": list(spec.img_size), "num_classes": 0, "global_pool": "token"}
    arguments = timm_arguments(shape, spec)
    arguments["img_size"] = list(spec.img_size)
    fallback = "hvit_xs" if spec.level == "region" else ENTRIES["vit_small"]
    return ENTRIES.get(spec.arch, fallback) if spec.level == "patch" else fallback, arguments


def _pretrained_config(loaded: LoadedBackbone, spec: BackboneSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "input_size": [spec.input_dim, *spec.img_size],
        "fixed_input_size": True,
        "num_classes": 0,
        "classifier": "head",
        "first_conv": "patch_embed.proj" if spec.level == "patch" else None,
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bicubic",
    }
    if loaded.level == "patch":
        transform = loaded.transform or TRANSFORMS["imagenet"]
        config |= {"mean": list(transform.mean), "std": list(transform.std)}
    return config


def _history(loaded: LoadedBackbone, spec: BackboneSpec) -> dict[str, Any]:
    """What a checkpoint of this package says, but for the settings of optimizers and heads."""
    return {
        "format": FORMAT,
        "own": loaded.own,
        "level": loaded.level,
        "step": loaded.step,
        "spec": spec.to_dict(),
        "transform": loaded.transform.to_dict() if loaded.transform else None,
        "geometry": {
            "spacing_um": loaded.spacing_um,
            "tile_size_px": loaded.tile_size_px,
            "region_cells": loaded.region_cells,
        },
        "config": loaded.config,
        "source": loaded.source,
        "source_fingerprint": loaded.fingerprint,
        **loaded.details,
    }
