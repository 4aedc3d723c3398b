"""``dino info``."""

from typing import Annotated

import typer

from dino.cli.command import ConfigFile, flat_scalars, with_settings
from dino.cli.grammar import expect, split
from dino.config.load import load_config
from dino.config.schema import InfoConfig

Words = Annotated[list[str] | None, typer.Argument(metavar="CHECKPOINT [KEY=VALUE]...", hidden=True)]


def info(words: Words = None, config: ConfigFile = None) -> None:
    """Say what a checkpoint is: architecture, training, transform, spacing and tile size.

    CHECKPOINT is a run, a checkpoint file (foreign ones too) or an export.

    For example:

        dino info runs/patch
    """
    positional, overrides = split(words or [])
    (source,) = expect(positional, ["CHECKPOINT"])
    settings = load_config(InfoConfig, file=config, overrides=overrides)
    from dino import api, progress

    progress.table(flat_scalars(api.info(source, settings.arch)))


command = with_settings(InfoConfig)
