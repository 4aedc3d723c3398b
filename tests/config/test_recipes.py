"""The YAML files that ship with the package: complete, commented, and true to the schema."""

import re
from pathlib import Path
from typing import Any

import pytest

from dino.config import schema
from dino.config.load import flatten, load_config, recipe_path, settings, to_dict
from dino.errors import ConfigError

# Recipe -> its schema, and the values in which it means to differ from the schema's defaults.
RECIPES: dict[str, tuple[type, dict[str, Any]]] = {
    "patch": (schema.PatchConfig, {"model.norm_last_layer": False}),
    "patch_pathology": (
        schema.PatchConfig,
        {
            "aug.vertical_flip": 0.5,
            "aug.quarter_turns": True,
            "aug.hed_jitter": 0.5,
            "aug.hed_strength": 0.05,
            "aug.brightness": 0.2,
            "aug.contrast": 0.2,
            "aug.saturation": 0.1,
            "aug.hue": 0.05,
            "aug.solarize": 0.0,
        },
    ),
    "region": (schema.RegionConfig, {"model.arch": "hvit_xs", "model.patch_size": 1}),
    "tile": (schema.TileConfig, {}),
    "extract": (schema.ExtractConfig, {}),
    "knn": (schema.KnnConfig, {}),
    "export": (schema.ExportConfig, {}),
    "info": (schema.InfoConfig, {}),
    "demo": (schema.DemoConfig, {}),
    "slurm": (schema.LaunchConfig, {}),
}


def _lines_with_keys(path: Path) -> list[tuple[str, str]]:
    """(dotted key, comment) of every leaf, read from the text itself and not by a YAML library."""
    found, stack = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)(\w+):(.*)$", line)
        if not match or line.startswith("#"):
            continue
        depth = len(match[1]) // 2
        stack[depth:] = [match[2]]
        value, _, comment = match[3].partition("  #")
        if value.strip():
            found.append((".".join(stack), comment.strip()))
    return found


def test_every_yaml_of_the_package_is_listed_here():
    assert {path.stem for path in recipe_path("patch").parent.glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_every_key_once_each_with_a_comment(name):
    found = _lines_with_keys(recipe_path(name))
    assert sorted(key for key, _ in found) == sorted(item.key for item in settings(RECIPES[name][0]))
    assert [key for key, comment in found if len(comment) < 8] == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_differs_from_the_schema_only_where_it_means_to(name):
    kind, different = RECIPES[name]
    expected = flatten(to_dict(load_config(kind))) | different
    assert flatten(to_dict(load_config(kind, recipe=name))) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_the_page(name):
    text = recipe_path(name).read_text(encoding="utf-8")
    assert max(len(line) for line in text.splitlines()) <= 120


def test_the_original_recipe_holds_the_published_values():
    """Caron et al. 2021 (DINO), as the original system trains with them."""
    config = load_config(schema.PatchConfig, recipe="patch")
    assert (config.model.out_dim, config.model.momentum_teacher, config.model.norm_last_layer) == (65536, 0.996, False)
    assert (config.optim.name, config.optim.lr, config.optim.lr_scheduler.min_lr) == ("adamw", 0.0005, 1e-6)
    assert (config.optim.lr_scheduler.weight_decay, config.optim.lr_scheduler.weight_decay_end) == (0.04, 0.4)
    assert (config.training.nepochs, config.training.warmup_epochs, config.training.clip_grad) == (100, 10, 3.0)
    assert (config.aug.global_crops_scale, config.aug.local_crops_scale) == ([0.4, 1.0], [0.05, 0.4])
    assert (config.aug.local_crops_number, config.aug.vertical_flip, config.aug.hed_jitter) == (8, 0.0, 0.0)
    jitter = (config.aug.brightness, config.aug.contrast, config.aug.saturation, config.aug.hue)
    assert (config.aug.color_jitter, *jitter) == (0.8, 0.4, 0.4, 0.2, 0.1)


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ConfigError, match="patch_pathology"):
        recipe_path("pathology")
