"""``dino tile``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, end, with_settings
from dino.cli.grammar import expect_many, split
from dino.config.load import load_config
from dino.config.schema import TileConfig

Words = Annotated[list[str] | None, typer.Argument(metavar="SLIDE... ROOT [KEY=VALUE]...", hidden=True)]


def tile(words: Words = None, config: ConfigFile = None) -> None:
    """Find tissue and cut slides into tiles and regions on one lattice per slide.

    SLIDE is a slide, a folder of slides, or one slides.csv. Tiles, tables and previews come to lie under ROOT. The
    same command again goes on with the slides that are missing. One bad slide does not stop the others:
    slides_status.csv says why, and the exit code is 2.

    For example:

        dino tile slides/*.svs data spacing_um=0.5 num_workers=8
        dino tile slides.csv data dry_run=true
    """
    positional, overrides = split(words or [])
    inputs, root = expect_many(positional, "SLIDE", "ROOT")
    settings = load_config(TileConfig, file=config, overrides=overrides)
    from dino import api

    end(api.tile([Path(word) for word in inputs], Path(root), settings).exit_code)


command = with_settings(TileConfig)
