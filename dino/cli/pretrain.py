"""``dino pretrain patch`` and ``dino pretrain region``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import UsageError, named_or_positional
from dino.config.load import load_config
from dino.config.schema import PatchConfig, RegionConfig

Words = Annotated[list[str] | None, typer.Argument(metavar="ROOT RUN [KEY=VALUE]...", hidden=True)]
PatchRecipe = Annotated[str, typer.Option("--recipe", metavar="NAME", help="Start values: patch_pathology or patch.")]
RegionRecipe = Annotated[str, typer.Option("--recipe", metavar="NAME", help="Start values.")]


def patch(words: Words = None, config: ConfigFile = None, recipe: PatchRecipe = "patch_pathology") -> None:
    """Level 1: pretrain a vision transformer on tiles with DINO.

    ROOT is a folder that `dino tile` wrote, or any folder of images; RUN is the folder of the run. The same command
    again resumes the run; a finished run says so.

    For example:

        dino pretrain patch data runs/patch training.nepochs=100 model.out_dim=4096
        dino pretrain patch data runs/patch model.init=timm:vit_small_patch16_224.dino
        torchrun --nproc_per_node=8 -m dino pretrain patch data runs/patch
    """
    pretrain("patch", words or [], config, recipe)


def region(words: Words = None, config: ConfigFile = None, recipe: RegionRecipe = "region") -> None:
    """Level 2: pretrain a small vision transformer on the feature grids of regions with DINO.

    ROOT is a folder that `dino extract` filled, or any folder of .pt grids; RUN is the folder of the run. The same
    command again resumes the run; a finished run says so.

    For example:

        dino pretrain region data runs/region training.nepochs=100
    """
    pretrain("region", words or [], config, recipe)


def pretrain(level: str, words: list[str], file: Path | None, recipe: str) -> None:
    """Train one level; the arguments are those of :func:`resolve`."""
    settings = resolve(level, words, file, recipe)
    from dino import api

    api.pretrain(settings)


def resolve(level: str, words: list[str], file: Path | None, recipe: str) -> PatchConfig | RegionConfig:
    """Resolve the settings of one level.

    Args:
        level: ``patch`` or ``region``.
        words: ROOT and RUN by place, or as ``data_dir=`` and ``output_dir=``, and settings.
        file: The user's YAML; it may name the two folders as well, as a run's own ``config.yaml`` does.
        recipe: Name of the YAML whose values are the defaults.

    Raises:
        UsageError: If one of the two folders is not given at all.
    """
    folders, overrides = named_or_positional(words, {"data_dir": "ROOT", "output_dir": "RUN"})
    schema: type[PatchConfig] | type[RegionConfig] = PatchConfig if level == "patch" else RegionConfig
    settings = load_config(schema, recipe=recipe, file=file, overrides=overrides)
    settings = dataclasses.replace(settings, **folders)
    needed = ("data_dir",) if settings.dry_run or settings.profile else ("data_dir", "output_dir")
    missing = [key for key in needed if not getattr(settings, key)]
    if missing:
        raise UsageError(f"expected ROOT and RUN (or data_dir= and output_dir=), found no {' and no '.join(missing)}")
    return settings


patch_command = with_settings(PatchConfig, "patch_pathology")
original_patch_command = with_settings(PatchConfig, "patch")
region_command = with_settings(RegionConfig, "region")
