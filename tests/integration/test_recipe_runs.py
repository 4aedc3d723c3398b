"""Every recipe trains, resumes exactly, judges and exports; the first lines of a run name the one that suits it."""

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY, Crash, assert_same_bits, config, crash_after, last

from dino.api import export, load_backbone, pretrain
from dino.api.levels import PatchLevel
from dino.config.load import RECIPES, load_config
from dino.config.schema import ExportConfig, PatchConfig, RegionConfig
from dino.train.run_folder import RunReader

# What makes a recipe small; everything else is the recipe's.
KEPT = ("optim.lr", "model.drop_path_rate", "training.freeze_last_layer")
SMALL = {key: value for key, value in TINY.items() if key not in KEPT}
SMALL_TILES = {"model.patch_size": 8, "aug.global_crops_size": 32, "aug.local_crops_size": 16}


PUBLIC = {"patch_continue": "model.init", "patch_distill": "teacher"}  # settings that name another model


@pytest.mark.parametrize("recipe", [name for names in RECIPES.values() for name in names])
def test_a_recipe_trains_resumes_judges_and_exports(
    recipe: str, tiles: Path, grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = next(schema for schema, names in RECIPES.items() if recipe in names)
    small: dict[str, Any] = {**SMALL, "objective.spread_group": 2}
    if schema is PatchConfig:
        small |= SMALL_TILES
    if recipe in PUBLIC:
        pretrain(config(tiles, tmp_path / "public", **{"model.patch_size": 8}))
        small[PUBLIC[recipe]] = str(tmp_path / "public")

    def settings(run: str) -> PatchConfig | RegionConfig:
        data = tiles if schema is PatchConfig else grids
        folders = {"data_dir": str(data), "output_dir": str(tmp_path / run)}
        return load_config(schema, recipe=recipe, overrides={**small, **folders})

    pretrain(settings("whole"))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 5)
        pretrain(settings("cut"))
    pretrain(settings("cut"))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    assert RunReader(tmp_path / "whole").status()["verdict"]["word"]
    exported = export(str(tmp_path / "whole"), tmp_path / "exported", ExportConfig())
    assert load_backbone(exported).backbone.embed_dim == 32
    masked = settings("whole").objective.ibot > 0
    assert ("backbone.mask_token" in last(tmp_path / "whole")["student"]) == masked


@pytest.mark.parametrize(
    ("recipe", "changes", "samples", "named"),
    [
        ("patch_pathology", {"model.init": "model.pt"}, 5_000_000, "patch_continue"),
        ("patch_pathology", {}, 20_000, "patch_continue"),
        ("patch_pathology", {}, 5_000_000, "patch_dinov2"),
        ("patch_dinov2", {}, 5_000_000, None),
        ("patch_continue", {"model.init": "model.pt"}, 20_000, None),
        ("patch_distill", {"teacher": "model.pt"}, 20_000, None),
        ("patch_pathology", {"teacher": "model.pt"}, 20_000, None),
        ("patch_pathology", {"teacher": "model.pt", "objective.dino": 0.0}, 20_000, "patch_distill"),
    ],
)
def test_the_recipe_that_suits_is_named(recipe: str, changes: dict[str, Any], samples: int, named: str | None) -> None:
    advice = PatchLevel.recommended_recipe(load_config(PatchConfig, recipe=recipe, overrides=changes), samples)
    assert (named is None and advice is None) or (advice is not None and f"--recipe {named}" in advice)
