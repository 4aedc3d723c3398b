"""Recipes: their resolved values, and that they contain only differences from the defaults, with reasons."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dino.config import schema
from dino.config.load import RECIPES, flatten, load_config, recipe_comment, recipe_path, settings, to_dict
from dino.errors import ConfigError

# All settings of each recipe with their values, as resolved by version 0.1.0.
RESOLVED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("resolved_values.json").read_text())
SCHEMAS: dict[str, tuple[type, str | None]] = {
    "patch": (schema.PatchConfig, "patch"),
    "patch_pathology": (schema.PatchConfig, "patch_pathology"),
    "region": (schema.RegionConfig, "region"),
    "patch (defaults)": (schema.PatchConfig, None),
    "region (defaults)": (schema.RegionConfig, None),
    "tile": (schema.TileConfig, None),
    "extract": (schema.ExtractConfig, None),
    "knn": (schema.KnnConfig, None),
    "export": (schema.ExportConfig, None),
    "info": (schema.InfoConfig, None),
    "demo": (schema.DemoConfig, None),
    "slurm": (schema.LaunchConfig, None),
}
CHANGED = {"export": {"tile_size_px": None}, "demo": {"patch_steps": 800}}  # defaults that differ from version 0.1.0
FILES = [recipe_path(kind, name) for kind, names in RECIPES.items() for name in names]


def _entries(path: Path) -> list[tuple[str, str, str]]:
    """(dotted key, value, comment) of every leaf, parsed from the text without a YAML library."""
    found, stack = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)(\w+):(.*)$", line)
        if not match or line.startswith("#"):
            continue
        stack[len(match[1]) // 2 :] = [match[2]]
        value, _, comment = match[3].partition("  #")
        if value.strip():
            found.append((".".join(stack), value.strip(), comment.strip()))
    return found


@pytest.mark.parametrize("name", RESOLVED)
def test_resolved_values_are_those_of_version_0_1_0(name):
    kind, recipe = SCHEMAS[name]
    found = flatten(to_dict(kind() if "defaults" in name else load_config(kind, recipe=recipe)))
    expected = RESOLVED[name] | CHANGED.get(name, {})
    assert {key: found[key] for key in expected} == expected
    assert {key: type(found[key]) for key in expected} == {key: type(value) for key, value in expected.items()}


def test_every_yaml_of_the_package_is_a_recipe():
    assert set(Path(schema.__file__).parent.glob("*.yaml")) == set(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_contains_only_differences_each_with_a_reason(path):
    kind = next(kind for kind, names in RECIPES.items() if path.stem in names)
    defaults = {item.key: item.default for item in settings(kind)}
    values = flatten(to_dict(load_config(kind, recipe=path.stem)))
    entries = _entries(path)
    assert entries
    for key, _, reason in entries:
        assert values[key] != defaults[key], key
        assert len(reason) >= 8, key
    assert {key for key, value in values.items() if value != defaults[key]} == {key for key, _, _ in entries}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_has_lines_of_120_columns_at_most(path):
    assert max(len(line) for line in path.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_original_recipe_contains_the_published_values():
    """Values of Caron et al. 2021 (DINO), as used by the original system."""
    config = load_config(schema.PatchConfig, recipe="patch")
    assert (config.model.out_dim, config.model.momentum_teacher, config.model.norm_last_layer) == (65536, 0.996, False)
    assert (config.optim.name, config.optim.lr, config.optim.lr_scheduler.min_lr) == ("adamw", 0.0005, 1e-6)
    assert (config.optim.lr_scheduler.weight_decay, config.optim.lr_scheduler.weight_decay_end) == (0.04, 0.4)
    assert (config.training.nepochs, config.training.warmup_epochs, config.training.clip_grad) == (100, 10, 3.0)
    assert (config.aug.global_crops_scale, config.aug.local_crops_scale) == ([0.4, 1.0], [0.05, 0.4])
    assert (config.aug.local_crops_number, config.aug.vertical_flip, config.aug.hed_jitter) == (8, 0.0, 0.0)
    jitter = (config.aug.brightness, config.aug.contrast, config.aug.saturation, config.aug.hue)
    assert (config.aug.color_jitter, *jitter) == (0.8, 0.4, 0.4, 0.2, 0.1)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            schema.PatchConfig,
            "pathology",
            r"\(patch_pathology, .*, patch\), found 'pathology'; did you mean 'patch_path",
        ),
        (schema.PatchConfig, "region", "patch_pathology, patch_dinov2"),
        (schema.RegionConfig, "patch", r"expected a recipe \(region, region_ibot\)"),
        (schema.PatchConfig, "my.yaml", "--config"),
        (schema.TileConfig, "tile", "has none"),
    ],
)
def test_the_error_for_an_unknown_recipe_lists_those_of_the_command(kind, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(kind, recipe=name)
    assert "demo" not in str(caught.value)


def test_the_comment_of_a_recipe_is_its_beginning():
    comment = recipe_comment(schema.PatchConfig, "patch_pathology")
    assert comment.startswith("# Level 1, recommended") and "< 20k" in comment and "vertical_flip" not in comment
